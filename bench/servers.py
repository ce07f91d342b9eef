"""Starts the servers that are measured, each a process of its own on the first core."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER_CORE, LOAD_CORE = 0, 1


def pin(core: int) -> None:
    """Keeps this process on one core, where the machine has several and allows it."""
    if hasattr(os, "sched_setaffinity") and core in os.sched_getaffinity(0):
        os.sched_setaffinity(0, {core})


class Server:
    """A server process.

    Args:
        name: For messages.
        command: What to run after the Python interpreter; `{port}` is replaced.
    """

    def __init__(self, name: str, *command: str) -> None:
        self.name = name
        self.port = free_port()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *(part.format(port=self.port) for part in command)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            # The parent's core is inherited, and a thread pool sized before a later pinning would not fit.
            preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}) if hasattr(os, "sched_setaffinity") else None,
        )
        while True:
            if self.process.poll() is not None:
                self._log.seek(0)
                raise RuntimeError(f"{name} did not start: {self._log.read()[-1000:]}")
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                break
            except OSError:
                time.sleep(0.01)
            if time.perf_counter() - start > 120:
                raise RuntimeError(f"{name} does not listen")
        self.seconds_to_start = time.perf_counter() - start

    @property
    def resident_bytes(self) -> int:
        """Gives the memory that the process has in use."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("this system does not tell the memory of a process")

    def stop(self) -> None:
        """Ends the process."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


@contextmanager
def running(*servers: tuple[str, ...]) -> Iterator[dict[str, Server]]:
    """Runs some servers, each given by its name and command."""
    started: dict[str, Server] = {}
    try:
        for name, *command in servers:
            started[name] = Server(name, *command)
        yield started
    finally:
        for server in started.values():
            server.stop()


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """Runs a Redis that appends to its file each second, on the load's core; gives its address."""
    port = free_port()
    flags = "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"
    process = subprocess.Popen(["redis-server", *flags, "--loglevel", "warning"], stdout=subprocess.DEVNULL)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {LOAD_CORE} & os.sched_getaffinity(0) or os.sched_getaffinity(0))
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.01)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


def free_port() -> int:
    """Gives a port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
