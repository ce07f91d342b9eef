"""Starts the servers that are measured, each with all its processes on the first core. Linux only: it reads /proc."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER_CORE, LOAD_CORE = 0, 1


class NotToBeHad(RuntimeError):
    """A server does not start here; the message says why."""


def pin(core: int, process: int = 0) -> None:
    """Keeps a process (0: this one) on one core, where the machine has several and allows it."""
    if core in os.sched_getaffinity(0) | os.sched_getaffinity(process):
        os.sched_setaffinity(process, {core})


class Server:
    """A server process, and those that it starts.

    Args:
        name: Who it is.
        command: What to run after the Python interpreter; `{port}` is replaced.
        ready: The path that is answered 200 once it takes requests; where there is none, it does so once it listens.
    """

    def __init__(self, name: str, *command: str, ready: str | None = None) -> None:
        self.name = name
        self.port = free_port()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *(part.format(port=self.port) for part in command)],
            cwd=ROOT,
            stdout=self._log,
            stderr=self._log,
            # The parent's core is inherited, and a thread pool sized before a later pinning would not fit.
            preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
        )
        while not is_ready(self.port, ready):
            if self.process.poll() is not None:
                self._log.seek(0)
                raise NotToBeHad(f"{name} does not start: {self._log.read().strip()[-1000:]}")
            if time.perf_counter() - start > 120:
                self.stop()
                raise NotToBeHad(f"{name} is not ready after two minutes")
            time.sleep(0.005)
        self.seconds_to_start = time.perf_counter() - start

    def cpu_seconds(self) -> float:
        """Gives the CPU time that it has taken so far, with all processes that it has started and that still run."""
        return sum(cpu_seconds(process) for process in tree(self.process.pid))

    @property
    def resident_bytes(self) -> int:
        """Gives the memory that the first process has in use."""
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
            self.process.wait()
        self._log.close()


def is_ready(port: int, path: str | None) -> bool:
    """Tells whether a server listens, and, of a path, whether it answers 200."""
    try:
        if path is None:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return True
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def cpu_seconds(process: int) -> float:
    """Gives the CPU time of a process, of all its threads, those that have ended too, to the nanosecond."""
    # What clock_getcpuclockid(3) gives for a process; Python has no name for it. /proc tells it in ticks of 10 ms only.
    try:
        return time.clock_gettime((~process << 3) | 2)
    except OSError:
        return 0.0  # it has just ended


def tree(process: int) -> list[int]:
    """Gives a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # pid (name) state ppid ...; the name may hold anything
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[tuple[str, int]]:
    """Runs a Redis that appends to its file each second, on the load's core; gives its address and its process."""
    port = free_port()
    flags = "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"
    process = subprocess.Popen(["redis-server", *flags, "--loglevel", "warning"], stdout=subprocess.DEVNULL)
    pin(LOAD_CORE, process.pid)
    try:
        while not is_ready(port, None):
            time.sleep(0.01)
        yield f"redis://127.0.0.1:{port}/0", process.pid
    finally:
        process.terminate()
        process.wait(10)


def free_port() -> int:
    """Gives a port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
