"""Runs a plan in generator processes, and deletes what it has made on the server."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import ssl
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cellserve.benchmark.plan import Failed, Plan, Tally
from cellserve.benchmark.target import BenchFailed, Target

_AT_ONCE = 8  # connections that delete


@dataclass(frozen=True, slots=True)
class Figures:
    """The result of one load. Latencies are in milliseconds; nan if nothing was answered."""

    seconds: float
    loaded: float  # seconds of load, warm-up and last answers included
    answers: int  # without an error
    steps_per_s: float
    requests_per_s: float  # answered in the measured time
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    errors: dict[str, int]  # requests (rows of a frame) by HTTP status, or by what else happened
    samples: dict[str, str]  # the first message of each of them
    drift: float  # steps in the second half of the time, divided by those in the first
    busy: float  # share of its core that the busiest generator used
    waited: float  # share of the time in which that generator waited for the core, which others used

    @classmethod
    def of(cls, tallies: list[Tally]) -> Figures:
        """Returns the figures of the generators that ran one load."""
        latencies: NDArray[np.float64] = np.concatenate([np.frombuffer(tally.latencies) for tally in tallies])
        p50, p95, p99, most = (
            (1e3 * np.quantile(latencies, [0.5, 0.95, 0.99, 1], method="inverted_cdf")).tolist()
            if len(latencies)
            else 4 * [float("nan")]
        )
        errors: Counter[str] = sum((tally.errors for tally in tallies), Counter())
        samples = {kind: text for tally in tallies for kind, text in tally.samples.items()}
        answers = len(latencies) - errors["unanswered"]
        first, second = (sum(tally.halves[half] for tally in tallies) for half in (0, 1))
        busiest = max(tallies, key=lambda tally: tally.busy + tally.waited)
        return cls(
            seconds=max(tally.seconds for tally in tallies),
            loaded=max(tally.loaded for tally in tallies),
            answers=answers,
            steps_per_s=sum(tally.steps / tally.seconds for tally in tallies),
            requests_per_s=sum(tally.requests / tally.seconds for tally in tallies),
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            max_ms=most,
            errors={kind: count for kind, count in sorted(errors.items()) if count},
            samples=samples,
            drift=second / first if first else float("nan"),
            busy=busiest.busy,
            waited=busiest.waited,
        )


class Generators:
    """The processes that run one plan. When the block is left they end, whatever they are doing.

    Args:
        plan: What to do.
        processes: How many processes share the clients, at most.
    """

    def __init__(self, plan: Plan, processes: int) -> None:
        count = min(processes, len(plan.clients))
        self._plans = [plan.share(place, count) for place in range(count)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the processes run

    def __enter__(self) -> Self:
        for _ in self._plans:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "cellserve.benchmark.generator"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                )
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe
                with contextlib.suppress(OSError):  # what it did not read any more
                    pipe.close()
        self._errors.close()

    def wait_until_ready(self) -> None:
        """Waits until all sessions are open; raises BenchFailed if they could not be opened."""
        for process, plan in zip(self._processes, self._plans, strict=True):
            self._write(process, pickle.dumps(plan))
        for process in self._processes:
            self._read(process)

    def run(self) -> Figures:
        """Runs the load and returns its figures."""
        for process in self._processes:
            self._write(process, b"go\n")
        return Figures.of([self._read(process) for process in self._processes])

    def _write(self, process: subprocess.Popen[bytes], data: bytes) -> None:
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):  # the read that follows says why
            process.stdin.write(data)
            process.stdin.flush()

    def _read(self, process: subprocess.Popen[bytes]) -> Any:
        assert process.stdout
        try:
            message = pickle.load(process.stdout)
        except (EOFError, pickle.UnpicklingError):
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise BenchFailed(f"the load generator ended: {last or process.wait()}") from None
        if isinstance(message, Failed):
            raise BenchFailed(message.why)
        return message


@dataclass
class Leftovers:
    """What the loads have made on the server and must be deleted, as the HTTP requests that do so.

    Attributes:
        target: The server.
        owed: The requests that were not answered yet.
    """

    target: Target
    owed: set[bytes] = field(default_factory=set)

    def add(self, plan: Plan) -> None:
        """Adds what a plan is about to make."""
        self.owed.update(end for client in plan.clients for end in client.ends)

    def delete(self) -> None:
        """Deletes it; what could not be deleted stays owed."""
        if self.owed:
            asyncio.run(self._delete())

    async def _delete(self) -> None:
        waiting = iter(list(self.owed))
        await asyncio.gather(*(self._delete_in_turn(waiting) for _ in range(_AT_ONCE)))

    async def _delete_in_turn(self, requests: Iterable[bytes]) -> None:
        target = self.target
        tls = ssl.create_default_context() if target.tls_name else None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError, KeyError):
            async with asyncio.timeout(30):
                reader, writer = await asyncio.open_connection(
                    target.host, target.port, ssl=tls, server_hostname=target.tls_name
                )
                try:
                    for request in requests:
                        writer.write(request)
                        head = (await reader.readuntil(b"\r\n\r\n")).lower()
                        status = int(head[9:12])
                        if status != 204:
                            length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
                            await reader.readexactly(int(length))
                        if status < 500:  # gone, or was never there
                            self.owed.discard(request)
                finally:
                    writer.close()
