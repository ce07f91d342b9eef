"""Opens a model version in a process of its own first: ONNX Runtime can crash while it opens a file.

Before anything is served that is a copy of this process, which has imported everything already: it takes as long as
opening the file. Later, among the threads that run models, it has to be a new process, which takes a second.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cellserve.models.signature import MODEL_NAME, STEP_NAME
from cellserve.service.model_repository.errors import BrokenModel, Stopping
from cellserve.service.runtime.onnx_model import Runtime, RuntimeOptions

_SECONDS = 300  # a version that takes longer is refused
_NICE = 10


class Trial:
    """Opens versions one at a time, each in a process that is allowed to crash. The arguments are those of `load`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the two below
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def open(
        self,
        name: str,
        path: Path,
        options: RuntimeOptions,
        max_batch: int,
        max_bytes: int,
        digests: Mapping[str, str],
    ) -> None:
        """Returns if opening a version and running it will not crash; while others are served.

        Raises:
            BrokenModel: It crashed, or took too long.
            Stopping: `close` was called.
        """
        with self._lock:
            if self._closed:
                raise Stopping
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        try:
            process.communicate(pickle.dumps((name, path, options, max_batch, max_bytes, digests)), _SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise BrokenModel(f"a process that tried to open it did not end within {_SECONDS} seconds") from None
        except OSError:  # it ended before it read all
            process.wait()
        if self._closed:
            raise Stopping
        _judge(process.returncode)

    def open_at_start(self, path: Path, options: RuntimeOptions, max_bytes: int, digests: Mapping[str, str]) -> None:
        """Returns if opening a version will not crash; before anything is served.

        Raises:
            BrokenModel: It crashed, or took too long.
        """
        if not hasattr(os, "fork") or sys.platform == "darwin":  # macOS's libraries do not survive it
            return
        copy = os.fork()
        if copy:
            _judge(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]))
            return
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_SECONDS)
            _open(path, replace(options, provider="cpu"), max_bytes, digests)  # a copy cannot use CUDA
        finally:
            os._exit(0)

    def close(self) -> None:
        """Ends the process under way, and opens none any more."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()


def _judge(exit_code: int) -> None:
    if exit_code < 0:
        how = signal.Signals(-exit_code).name
        raise BrokenModel(f"ONNX Runtime crashed ({how}) in a process that tried to open it")


def _open(path: Path, options: RuntimeOptions, max_bytes: int, digests: Mapping[str, str]) -> None:
    # Here and not above: the repository imports this module.
    from cellserve.service.model_repository.repository import read_files

    _, files = read_files(path, max_bytes, digests)
    Runtime(files[MODEL_NAME], options, files.get(STEP_NAME))


def _main() -> None:
    """Opens the version that standard input describes. Errors are left to the server, which meets them itself."""
    # Here and not above: the repository imports this module.
    from cellserve.service.model_repository.repository import load

    os.nice(_NICE)
    load(*pickle.load(sys.stdin.buffer))


if __name__ == "__main__":
    _main()
