"""The measured server processes, all pinned to one core. Linux only, since it reads /proc."""

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


class Unavailable(RuntimeError):
    """A server does not start on this machine; the message says why."""


def pin(core: int, process: int = 0) -> None:
    """Pins a process (0: this one) to a core, if the machine has and allows it."""
    if core in os.sched_getaffinity(0) | os.sched_getaffinity(process):
        os.sched_setaffinity(process, {core})


class Server:
    """A server process with its child processes.

    Args:
        name: Key of the server in `DIALECTS`.
        command: Arguments of the Python interpreter; `{port}` is replaced.
        ready: Path that answers 200 once the server accepts requests; None if it does as soon as it listens.
        core: The core it is pinned to; None leaves it all.
    """

    def __init__(self, name: str, *command: str, ready: str | None = None, core: int | None = SERVER_CORE) -> None:
        self.name = name
        self.port = free_port()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process runs
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *(part.format(port=self.port) for part in command)],
            cwd=ROOT,
            stdout=self._log,
            stderr=self._log,
            # Pinned before it starts: thread pools are sized for the cores that a process has at its start.
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
        while not is_ready(self.port, ready):
            if self.process.poll() is not None:
                self._log.seek(0)
                raise Unavailable(f"{name} does not start: {self._log.read().strip()[-1000:]}")
            if time.perf_counter() - start > 120:
                self.stop()
                raise Unavailable(f"{name} is not ready after two minutes")
            time.sleep(0.005)
        self.seconds_to_start = time.perf_counter() - start

    def cpu_seconds(self) -> float:
        """Returns the CPU time so far of the process and its running descendants."""
        return sum(cpu_seconds(process) for process in tree(self.process.pid))

    @property
    def resident_bytes(self) -> int:
        """Resident memory of the first process."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc does not show the memory of the process")

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
    """Whether a server listens and, if a path is given, answers 200 to it."""
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
    """Returns the CPU time of a process, including threads that have ended, to the nanosecond."""
    # The clock that clock_getcpuclockid(3) returns, which Python does not expose. /proc counts in ticks of 10 ms only.
    try:
        return time.clock_gettime((~process << 3) | 2)
    except OSError:
        return 0.0  # the process has just ended


def tree(process: int) -> list[int]:
    """Returns a process and its descendants."""
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
    """Runs a Redis that syncs its file each second, on the load's core; yields its URL and process id."""
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
    """Returns a port that the kernel says is free. Tests, which run side by side, have their own way."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
