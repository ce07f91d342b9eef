"""Opens and runs foreign graphs in a process of their own, in which ONNX Runtime may crash."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellserve.export.adopt.runtime_messages import reason
from cellserve.export.errors import ExportError

_WORKER = Path(__file__).with_name("trial_worker.py")


class CannotOpen(ExportError):
    """ONNX Runtime refuses the graph, or crashes while it opens it."""

    def __init__(self, why: str, crashed: bool = False) -> None:
        super().__init__(f"ONNX Runtime crashed ({why}) while it opened the graph" if crashed else
                         f"ONNX Runtime cannot open the model: {why}")  # fmt: skip


class CannotRun(ExportError):
    """The graph does not run on these inputs, or crashes ONNX Runtime."""

    def __init__(self, why: str, crashed: bool = False) -> None:
        super().__init__(f"ONNX Runtime crashed ({why}) while it ran the graph" if crashed else
                         f"it does not run: {why}")  # fmt: skip


class Trial:
    """A process that runs graphs; it is started when it is first needed, and again after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, content: bytes, outputs: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Opens a graph and runs it on several inputs; returns the outputs of each run, by name.

        Raises:
            CannotOpen: It cannot be opened.
            CannotRun: It cannot be run on one of the inputs.
        """
        kind: type[CannotOpen | CannotRun] = CannotOpen
        try:
            self._send((content, list(outputs), [dict(feeds) for feeds in runs]))
            while True:
                what, *told = self._receive()
                if what == "opened":
                    kind = CannotRun
                elif what == "ran":
                    return [dict(zip(outputs, ran, strict=True)) for ran in told[0]]
                else:
                    raise kind(reason(told[0]))
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise kind(self._stop(), crashed=True) from None

    def _send(self, request: Any) -> None:
        if self._process is None:
            # -P: the worker's folder is not a place to import from
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        assert self._process.stdin is not None
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process is not None and self._process.stdout is not None
        return pickle.load(self._process.stdout)

    def _stop(self) -> str:
        """Ends the process; returns how it ended, in a word."""
        process, self._process = self._process, None
        if process is None:
            return "not started"
        try:
            process.communicate(timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            process.kill()
            process.communicate()
        code = process.returncode
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"
