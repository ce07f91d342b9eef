"""A real server for the tests: a `cellserve serve` process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.fork_server import Forked, fork


@dataclass
class Server:
    """A `cellserve serve` process of its own."""

    process: subprocess.Popen[str] | Forked
    url: str
    log: list[str] = field(default_factory=list)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(**{"base_url": self.url, "timeout": 60, "verify": False, **options})

    def async_client(self, **options: Any) -> httpx.AsyncClient:
        """An asynchronous client; without TLS, whose certificates take 50 ms to load."""
        return httpx.AsyncClient(**{"base_url": self.url, "timeout": 60, "verify": False, **options})

    @property
    def grpc(self) -> str:
        """Where it speaks gRPC, if it was started with `--grpc-port 0`."""
        found = re.search(r"gRPC on (\S+)", "".join(self.log))
        assert found
        return found[1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal, waits for the end, and returns the exit status."""
        if self.process.poll() is None:
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)  # its workers too
            else:
                self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=60)
        self.log.append(out)
        return self.process.wait()


Serve = Callable[..., Server]  # the fixture `serve`: `start_server`, whose server ends with the test


def start_server(
    *flags: str, environment: dict[str, str] | None = None, files: int | None = None, fresh: bool = False
) -> Server:
    """Starts a server on a free port and waits until it listens.

    Args:
        flags: Its flags.
        environment: Variables beside this process's own.
        files: How many files it may open.
        fresh: Start an interpreter that imports everything itself: where its memory, its limits or its start matter.
    """
    arguments = ["serve", "--port", "0", *flags]
    if fresh or files is not None or "COVERAGE_PROCESS_CONFIG" in os.environ:  # which measures whole interpreters
        process = _start_interpreter(arguments, environment or {}, files)
    else:
        process = fork(*arguments, environment=environment)
    assert process.stdout
    log = []
    for line in process.stdout:
        log.append(line)
        found = re.search(r"running on (http://\S+)", line)
        if found:
            return Server(process, found[1], log)
    raise AssertionError("the server did not start:\n" + "".join(log))


def _start_interpreter(
    arguments: list[str], environment: dict[str, str], files: int | None
) -> subprocess.Popen[str] | Forked:
    limited = [] if files is None else ["prlimit", f"--nofile={files}"]
    return subprocess.Popen(
        [*limited, sys.executable, "-m", "cellserve.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )
