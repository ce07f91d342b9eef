"""The load generator `load.c`: builds it, writes its plan, runs it and reads the result."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("load.c")
FLAGS = ("-O2", "-Wall", "-Wextra")
INSTALL = "the load generator needs a C compiler `cc`: apt-get install gcc libc6-dev"
BUSY = 0.7  # above this share of its core, used or waited for, the generator itself may be the bottleneck


class LoadFailed(RuntimeError):
    """The generator could not be built or run, or a server gave a bad answer or none."""


class Request(NamedTuple):
    """One request of a load."""

    data: bytes
    steps: int = 1  # time steps in it


@dataclass(frozen=True, slots=True)
class Client:
    """One connection. It sends the leads once, then the requests in a cycle."""

    requests: Sequence[Request]
    leads: Sequence[bytes] = ()
    depth: int = 1  # requests in flight at once


@dataclass(frozen=True, slots=True)
class Load:
    """The result of a load, as `load.c` prints it.

    Latencies are in milliseconds: in an open loop from when a request was due, in a closed loop from when it was sent.
    """

    answers: int
    seconds: float
    per_s: float
    steps_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    waiting_ms: float  # closed loop: the longest wait for an answer that came after the measured time
    unanswered: int
    bad: int
    closed: int
    busy: float  # the generator's CPU time divided by the measured time
    delayed: float  # share of the measured time in which others used its core while it was ready to run
    turns: int = 0  # how often it woke up
    cpu: dict[str, float] = field(default_factory=dict)  # CPU seconds of other processes in that time, by name


def build() -> Path:
    """Compiles the generator if its source has changed, and returns the program.

    Raises:
        LoadFailed: There is no compiler, or it failed.
    """
    text = f"{platform.machine()} {FLAGS}".encode() + SOURCE.read_bytes()
    program = SOURCE.parent / ".build" / f"load-{hashlib.sha256(text).hexdigest()[:16]}"
    if program.exists():
        return program
    compiler = shutil.which("cc")
    if compiler is None:
        raise LoadFailed(INSTALL)
    program.parent.mkdir(exist_ok=True)
    made = program.with_suffix(f".{os.getpid()}")
    done = subprocess.run([compiler, *FLAGS, "-o", made, SOURCE, "-lm"], capture_output=True, text=True)
    if done.returncode:
        raise LoadFailed(f"{SOURCE.name} does not compile: {done.stderr[-2000:]}")
    made.replace(program)
    return program


def plan(clients: Sequence[Client]) -> bytes:
    """Returns the plan in the format that the head of `load.c` describes."""
    parts = [struct.pack("<I", len(clients))]
    for client in clients:
        requests = [*(Request(lead, 0) for lead in client.leads), *client.requests]
        parts.append(struct.pack("<3I", client.depth, len(client.leads), len(requests)))
        for data, steps in requests:
            parts += [struct.pack("<2I", steps, len(data)), data]
    return b"".join(parts)


class Generator:
    """A running load, on the core of this process.

    Args:
        port: Port of the server on this machine.
        clients: The connections.
        seconds: How long to measure.
        warm: Seconds of load before that; by default a tenth of `seconds`, at least 0.1.
        rate: Requests per second of an open loop; None for a closed loop.
        random: Whether those are due at random moments (a Poisson process), not at even distances.
        nice: Niceness of the generator's process.
    """

    def __init__(
        self,
        port: int,
        clients: Sequence[Client],
        seconds: float,
        *,
        warm: float | None = None,
        rate: float | None = None,
        random: bool = False,
        nice: int = 0,
    ) -> None:
        program = build()
        with tempfile.NamedTemporaryFile(prefix="cellserve-load-", delete=False) as file:
            file.write(plan(clients))
        self._plan = Path(file.name)
        self._started = False
        warm = max(0.1, 0.1 * seconds) if warm is None else warm
        arguments = [port, warm, seconds, self._plan, *([] if rate is None else [rate]), *["random"] * random]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process runs
        self._process = subprocess.Popen(
            ["nice", "-n", str(nice), program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def wait_for_start(self) -> None:
        """Waits until the measured time begins."""
        if not self._started:
            self._line()
        self._started = True

    def result(self, clocks: dict[str, Callable[[], float]] | None = None) -> Load:
        """Waits for the end and returns the result.

        Args:
            clocks: CPU clocks in seconds, by name, read when the measured time begins and ends.

        Raises:
            LoadFailed: An answer was bad or missing, or a connection was closed.
        """
        clocks = clocks or {}
        self.wait_for_start()
        before = {name: clock() for name, clock in clocks.items()}
        self._line()
        cpu = {name: clock() - before[name] for name, clock in clocks.items()}
        out = self._line()
        status = self._process.wait()
        self._errors.seek(0)
        errors = self._errors.read().strip()[:1000]
        self.stop()
        if status:
            raise LoadFailed(errors)
        load = Load(**json.loads(out), cpu=cpu)
        if load.bad or load.closed or load.unanswered or not load.answers:
            raise LoadFailed(
                f"{load.answers} good answers, {load.bad} bad ones, {load.unanswered} missing, "
                f"{load.closed} connections closed. {errors}".strip()
            )
        return load

    def stop(self) -> None:
        """Ends the process, if it still runs."""
        self._process.kill()
        self._process.wait()
        self._errors.close()
        self._plan.unlink(missing_ok=True)
        assert self._process.stdout
        self._process.stdout.close()

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


def drive(
    port: int,
    clients: Sequence[Client],
    seconds: float,
    *,
    rate: float | None = None,
    random: bool = False,
    clocks: dict[str, Callable[[], float]] | None = None,
) -> Load:
    """Runs a load and returns its result; the arguments are those of `Generator`."""
    return Generator(port, clients, seconds, rate=rate, random=random).result(clocks)
