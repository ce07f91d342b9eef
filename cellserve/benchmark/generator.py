"""The load generator, a process of its own: `python -m cellserve.benchmark.generator`.

It reads a pickled Plan from stdin, opens its connections and sends their leads, writes Ready, and waits for a line.
Then it runs the load and writes the Tally. It ends when stdin does, so that it never outlives its parent.

An open loop has a constant rate, and a latency counts from the moment at which the request was due, even if it was sent
later because an answer took its time. So the latencies include every request that a stall of the server delayed, not
only those that it had received (coordinated omission; Gil Tene's correction, as in wrk2:
https://github.com/giltene/wrk2). A closed loop cannot see that: its latencies are those of the requests sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import select
import selectors
import signal
import ssl
import sys
import threading
import time
from itertools import count
from time import monotonic
from typing import Any

from cellserve.benchmark.connection import Connection
from cellserve.benchmark.plan import Failed, Plan, Ready, Tally

LEAD_SECONDS = 60  # for all leads
_DRAIN_SECONDS = 10  # for the answers that are missing at the end
_AGAIN_SECONDS = 0.1  # before a connection that was lost is opened again
_AT_ONCE = 64  # connections that are being opened


class PreciseSelector(selectors.DefaultSelector):
    """A selector that wakes up within microseconds of its timeout, for open loops; epoll counts in milliseconds."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Waits for events."""
        if timeout and hasattr(self, "fileno"):
            select.select([self], [], [], timeout)
            timeout = 0
        return super().select(timeout)


class Generator:
    """A plan that is being run.

    Args:
        plan: What to do.
    """

    def __init__(self, plan: Plan) -> None:
        self.bodies, self.sending = list(plan.bodies), False
        self._plan, self._loop = plan, asyncio.get_running_loop()
        self._tally = Tally()
        self._connections: list[Connection] = []
        self._led = 0
        self._all_led: asyncio.Future[None] = self._loop.create_future()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._begin = self._half = self._end = float("inf")  # of the measured time
        self._tasks: set[asyncio.Task[None]] = set()
        self._tls = ssl.create_default_context() if plan.target.tls_name else None
        self._clocks = 0.0, 0.0

    async def open(self) -> None:
        """Opens the connections and waits until their leads are answered; raises ConnectionError."""
        plan, permits = self._plan, asyncio.Semaphore(_AT_ONCE)

        async def connect(connection: Connection) -> None:
            async with permits:
                await self._connect(connection)

        for place, client in enumerate(plan.clients):
            self._connections.append(Connection(self, client, place, plan.rate is not None))
        opening = asyncio.gather(*map(connect, self._connections))
        try:
            async with asyncio.timeout(LEAD_SECONDS):
                await asyncio.gather(opening, self._all_led)
        except TimeoutError:
            led = f"{self._led} of {len(plan.clients)}"
            raise ConnectionError(f"only {led} connections were ready within {LEAD_SECONDS} seconds") from None

    async def run(self) -> Tally:
        """Runs the load and returns what was counted."""
        plan = self._plan
        started = monotonic()
        self._begin = started + plan.warm_up
        self._end = self._begin + plan.seconds
        self._half = self._begin + plan.seconds / 2
        self.sending = True
        if plan.rate is None:
            for connection in self._connections:
                connection.send()
        else:
            self._hand_out(started, plan.rate)
        self._at(self._begin, self._read_clocks)
        self._at(self._end, self._stop)
        await self._over
        self._tally.loaded = monotonic() - started
        for connection in self._connections:
            connection.close()
        return self._tally

    # What connections tell.

    def led(self) -> None:
        """A connection's leads are answered."""
        self._led += 1
        if self._led == len(self._connections) and not self._all_led.done():
            self._all_led.set_result(None)

    def lead_failed(self, why: str) -> None:
        """A connection could not be led."""
        if not self._all_led.done():
            self._all_led.set_exception(ConnectionError(why))
        else:
            self.fail(monotonic(), "not led again", why)

    def count(self, since: float, now: float, steps: float) -> None:
        """Counts an answer."""
        if self._begin <= now < self._end:
            self._tally.requests += 1
            first, second = self._tally.halves
            self._tally.halves = (first + steps, second) if now < self._half else (first, second + steps)
        if self._counts(since, now):
            self._tally.latencies.append(now - since)

    def fail(self, since: float, kind: str, sample: str, rows: int = 1) -> None:
        """Counts a failure."""
        if rows and not self._counts(since, now := monotonic()):
            return
        if rows:
            self._tally.requests += self._begin <= now < self._end
            self._tally.errors[kind] += rows
        if sample:
            self._tally.samples.setdefault(kind, sample)

    def lost(self, connection: Connection) -> None:
        """Opens a connection again, unless the load is over."""
        if not self._all_led.done():
            self._all_led.set_exception(ConnectionError("the server closed a connection"))
        elif not self._over.done():
            task = self._loop.create_task(self._again(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # The clock.

    def _counts(self, since: float, now: float) -> bool:
        """Whether a request belongs to the measured time: in an open loop by when it was due."""
        return self._begin <= (now if self._plan.rate is None else since) < self._end

    def _hand_out(self, started: float, rate: float) -> None:
        """Open loop: gives the requests that are due to the connections in turn."""
        connections, numbers = self._connections, count()
        due, connection = started, 0

        def hand_out() -> None:
            nonlocal due, connection
            now = monotonic()
            while due <= now and due < self._end:
                connections[connection].give(due)
                connection = (connection + 1) % len(connections)
                due = started + (next(numbers) + 1) / rate
            if due < self._end:
                self._at(due, hand_out)

        hand_out()

    def _at(self, moment: float, call: Any) -> None:
        self._loop.call_later(max(0.0, moment - monotonic()), call)

    def _read_clocks(self) -> None:
        self._clocks = time.process_time(), _waited()

    def _stop(self) -> None:
        """Ends the measured time."""
        now = monotonic()
        if self._plan.rate is None:
            # With fewer answers than connections a closed loop has no meaningful rate.
            if self._tally.requests < len(self._connections) and now < self._end + _DRAIN_SECONDS:
                self._end = float("inf")
                self._loop.call_later(0.01, self._stop_late, now + _DRAIN_SECONDS)
                return
            self._finish(now)
        else:
            self._finish(self._end)

    def _stop_late(self, deadline: float) -> None:
        now = monotonic()
        if self._tally.requests < len(self._connections) and now < deadline:
            self._loop.call_later(0.01, self._stop_late, deadline)
        else:
            self._finish(now)

    def _finish(self, end: float) -> None:
        tally, self._end, self.sending = self._tally, end, False
        tally.seconds = end - self._begin
        tally.busy = (time.process_time() - self._clocks[0]) / tally.seconds
        tally.waited = (_waited() - self._clocks[1]) / tally.seconds
        tally.steps = sum(tally.halves)
        self._drain(monotonic() + _DRAIN_SECONDS)

    def _drain(self, deadline: float) -> None:
        """Waits for the answers that are missing, so that no work left over slows the next load."""
        missing = [one for one in self._connections if one.in_flight or one.due]
        now = monotonic()
        if missing and now < deadline:
            self._loop.call_later(0.005, self._drain, deadline)
            return
        for one in missing:
            # They took at least as long as this. Without them the percentiles of an overload would flatter.
            for since in [*([one.since] if one.in_flight else []), *one.due]:
                if self._plan.rate is None or self._counts(since, now):
                    self._tally.latencies.append(now - since)
                    self._tally.errors["unanswered"] += 1
        self._over.set_result(None)

    # Connecting.

    async def _connect(self, connection: Connection) -> None:
        target = self._plan.target
        await self._loop.create_connection(
            lambda: connection, target.host, target.port, ssl=self._tls, server_hostname=target.tls_name
        )

    async def _again(self, connection: Connection) -> None:
        while not self._over.done():
            await asyncio.sleep(_AGAIN_SECONDS)
            try:
                return await self._connect(connection)
            except OSError as error:
                self.fail(monotonic(), "no connection", str(error))


def _waited() -> float:
    """Returns the seconds in which this process was ready to run but did not, if the kernel counts them."""
    try:
        with open("/proc/self/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _raise_file_limit() -> None:
    """Allows as many connections as the system does."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _generate(plan: Plan) -> None:
    go = asyncio.Event()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        if sys.stdin.buffer.readline():
            loop.call_soon_threadsafe(go.set)
            sys.stdin.buffer.read()  # until the parent has ended, or wants this to end
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    generator = Generator(plan)
    try:
        await generator.open()
    except OSError as error:
        return _tell(Failed(str(error)))
    _tell(Ready())
    await go.wait()
    _tell(await generator.run())


def _tell(message: Ready | Failed | Tally) -> None:
    pickle.dump(message, sys.stdout.buffer)
    sys.stdout.buffer.flush()


def main() -> None:
    """Runs one load."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    plan: Plan = pickle.load(sys.stdin.buffer)
    _raise_file_limit()
    selector = selectors.DefaultSelector if plan.rate is None else PreciseSelector
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector())) as runner:
        runner.run(_generate(plan))


if __name__ == "__main__":
    main()
