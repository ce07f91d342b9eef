"""A `cellserve serve` process of the benchmark's own, on a free port."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from cellserve.benchmark.target import BenchFailed

_START_SECONDS = 120
_STOP_SECONDS = 10


class OwnServer:
    """A server that runs as long as its block.

    Args:
        models: The model repository, or None for the server's default.
        flags: Further flags of `cellserve serve`.

    Raises:
        BenchFailed: It did not start, and why.
    """

    def __init__(self, models: Path | None, flags: Sequence[str]) -> None:
        self.flags = tuple(flags)
        self.url = ""
        self._log = tempfile.NamedTemporaryFile(prefix="cellserve-bench-")  # noqa: SIM115  read while it is written
        repository = ("--models", str(models)) if models else ()
        command = [sys.executable, "-m", "cellserve.cli", "serve", *repository, "--port", "0", *flags]
        # In a session of its own: Ctrl-C first deletes the sessions, then stops it.
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, start_new_session=True)

    def __enter__(self) -> Self:
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            log = Path(self._log.name).read_text(errors="replace")
            if self._process.poll() is not None:
                last = log.strip().rpartition("\n")[2].removeprefix("cellserve serve: ")
                raise BenchFailed(f"cellserve serve did not start: {last or self._process.returncode}")
            found = re.search(r"running on (https?://[^\s\"]+)", log)
            if found:
                self.url = found[1].replace("//0.0.0.0:", "//127.0.0.1:")
                if self._is_ready():
                    return
            time.sleep(0.05)
        raise BenchFailed(f"cellserve serve was not ready within {_START_SECONDS} seconds")

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False
