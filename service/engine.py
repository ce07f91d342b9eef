"""The engine: gathers waiting work from all requests into ticks, each one run of ONNX Runtime over a batch of slots.

All work is an advance: move the state in a slot by these time steps. Requests join and leave between ticks (cellular
batching: Gao et al., Low Latency RNN Inference with Cellular Batching, EuroSys 2018); no timer waits to fill a batch,
what arrives during a tick makes the next.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arena import Arena
from service.errors import ModelFailed, NotFinite, Problem, QueueFull
from service.repository import Model
from service.settings import Settings

Array = NDArray[Any]

Result = tuple[Array, list[Array]] | Exception

log = logging.getLogger("cellserve")


@dataclass(slots=True, eq=False)
class Advance:
    """Work that waits, or is under way: these time steps for the state in that slot, all of them or none."""

    x: Array  # [time, *features]
    slot: int  # what it works on: a copy of its home where it takes several ticks, until all is done
    home: int  # the slot that is to have moved at the end
    every_output: bool  # whether the outputs of all time steps are wanted, or the last one's
    done: asyncio.Future[Array]  # gives y: [time, *outputs], or [1, *outputs]
    applied: Callable[[], None] | None  # told in the very moment when the state has moved
    position: int = 0  # time steps taken
    outputs: list[Array] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Time steps still to take."""
        return len(self.x) - self.position


@dataclass(frozen=True, slots=True)
class Tick:
    """One run: the advances that take part, and how many time steps each takes."""

    advances: list[Advance]
    lengths: list[int]


def choose(waiting: deque[Advance], max_batch: int, quantum: int) -> Tick:
    """Chooses the next tick and takes its advances out of the queue.

    The one that has waited longest sets the number of time steps (at most the quantum). The others join in the order of
    the queue: those with at least as many left take as many, those with a little less are padded (at most a quarter),
    the rest wait for a tick of their own length. So little padding is computed, and a long sequence holds a short one
    up for no longer than a tick.
    """
    steps = min(waiting[0].remaining, quantum)
    advances: list[Advance] = []
    lengths: list[int] = []
    passed: list[Advance] = []
    while waiting and len(advances) < max_batch:
        advance = waiting.popleft()
        length = min(advance.remaining, steps)
        if 4 * length >= 3 * steps:
            advances.append(advance)
            lengths.append(length)
        else:
            passed.append(advance)
    waiting.extendleft(reversed(passed))
    return Tick(advances, lengths)


class Engine:
    """Runs one model's advances, tick after tick.

    Args:
        model: The model; where it is not exact, each tick is one row and one time step, the one shape that always
            gives the same bits.
        settings: Batch size, quantum, bounds.
        executor: One thread for runs that would hold up the event loop for too long.
    """

    def __init__(self, model: Model, settings: Settings, executor: ThreadPoolExecutor) -> None:
        self.model = model
        # Sequences in flight have slots too, beside the sessions'.
        self.arena = Arena(model.runtime.signature.states, settings.max_sessions + settings.max_queued_steps)
        exact = model.exactness.proved
        self._max_batch = settings.max_batch if exact else 1
        self._quantum = settings.quantum if exact else 1
        self._inline_seconds = settings.inline_microseconds / 1e6
        self._max_queued = settings.max_queued_steps
        self._executor = executor
        self._waiting: deque[Advance] = deque()
        self._queued = 0  # time steps waiting
        self._running = False  # a tick is scheduled or under way
        self._seconds: dict[int, float] = {}  # by the power of two of rows x steps: smoothed time of a run

    def submit(
        self, slot: int, x: Array, every_output: bool, applied: Callable[[], None] | None = None
    ) -> asyncio.Future[Array]:
        """Queues an advance.

        Args:
            slot: The slot to move; no other advance of it may be waiting.
            x: `[time, *features]`, checked.
            every_output: Whether the outputs of all time steps are wanted.
            applied: Given for a slot that outlives the request and must move as a whole or not at all; it is called in
                the moment when the slot has moved, whoever still waits for the answer.

        Returns:
            A future of `y [time, *outputs]` (time is 1 where the last output is wanted). Cancelling it drops what has
            not been computed. It raises `NotFinite` or `ModelFailed` where nothing has been applied.

        Raises:
            QueueFull: More time steps would wait than may.
        """
        if self._queued and self._queued + len(x) > self._max_queued:
            raise QueueFull(
                f"{self._queued} time steps are waiting for model {self.model.name!r}: try again in a second"
            )
        loop = asyncio.get_running_loop()
        own = slot if applied is None or len(x) <= self._quantum else self._copied(slot)
        advance = Advance(x, own, slot, every_output, loop.create_future(), applied)
        self._waiting.append(advance)
        self._queued += len(x)
        if not self._running:
            self._running = True
            loop.call_soon(self._tick)
        return advance.done

    def _copied(self, slot: int) -> int:
        copy = self.arena.take()
        if copy is None:
            raise QueueFull(f"too many sequences are in flight for model {self.model.name!r}: try again in a second")
        self.arena.copy(slot, copy)
        return copy

    def _tick(self) -> None:
        """Runs one tick, here or on the thread, and schedules the next while there is work."""
        while self._waiting and self._waiting[0].done.cancelled():
            dropped = self._waiting.popleft()
            self._queued -= dropped.remaining
            self._end(dropped)
        if not self._waiting:
            self._running = False
            return
        tick = choose(self._waiting, self._max_batch, self._quantum)
        x, lengths, slots = self._gathered(tick)
        states = self.arena.gather(slots)
        loop = asyncio.get_running_loop()
        size = (x.shape[0] * x.shape[1]).bit_length()
        if self._predicted(size) <= self._inline_seconds:
            self._apply(tick, slots, x, lengths, states, self._timed_run(size, x, lengths, states))
            loop.call_soon(self._tick)
            return

        def finish(run: asyncio.Future[Result]) -> None:
            self._apply(tick, slots, x, lengths, states, run.result())
            self._tick()

        loop.run_in_executor(self._executor, self._timed_run, size, x, lengths, states).add_done_callback(finish)

    def _gathered(self, tick: Tick) -> tuple[Array, NDArray[np.int32], NDArray[np.intp]]:
        """Puts the time steps of a tick side by side: x `[batch, time, *features]`, lengths and slots `[batch]`."""
        parts = [
            advance.x[advance.position : advance.position + length]
            for advance, length in zip(tick.advances, tick.lengths, strict=True)
        ]
        longest = max(tick.lengths)
        if min(tick.lengths) == longest:
            x = np.stack(parts)
        else:
            x = np.zeros((len(parts), longest, *parts[0].shape[1:]), parts[0].dtype)
            for row, part in enumerate(parts):
                x[row, : len(part)] = part
        return x, np.array(tick.lengths, np.int32), np.array([advance.slot for advance in tick.advances], np.intp)

    def _run(self, x: Array, lengths: NDArray[np.int32], states: list[Array]) -> Result:
        try:
            return self.model.runtime.run(x, lengths, states)
        except Exception as error:
            return error

    def _timed_run(self, size: int, x: Array, lengths: NDArray[np.int32], states: list[Array]) -> Result:
        start = time.perf_counter()
        result = self._run(x, lengths, states)
        taken = time.perf_counter() - start
        self._seconds[size] = 0.8 * self._seconds.get(size, taken) + 0.2 * taken
        return result

    def _predicted(self, size: int) -> float:
        """Gives the seconds that a run of `2 ** size` rows x steps is expected to take, from those seen."""
        for smaller in range(size, -1, -1):
            if smaller in self._seconds:
                return self._seconds[smaller] * float(2 ** (size - smaller))
        return 0.0 if size <= 1 else math.inf

    def _apply(
        self,
        tick: Tick,
        slots: NDArray[np.intp],
        x: Array,
        lengths: NDArray[np.int32],
        states: list[Array],
        result: Result,
    ) -> None:
        """Applies a tick that has run; a tick that failed is run again row by row, so that only the guilty fail."""
        advances = tick.advances
        if isinstance(result, tuple) and _finite(*result, lengths):
            y, following = result
            kept = [row for row, advance in enumerate(advances) if not advance.done.cancelled()]
            if len(kept) == len(advances):
                self.arena.scatter(slots, following)
            else:
                self.arena.scatter(slots[kept], self._rows(following, kept))
            for row, advance in enumerate(advances):
                self._advanced(advance, y[row, : tick.lengths[row]])
        elif len(advances) > 1:
            for row, advance in enumerate(advances):
                length = tick.lengths[row]
                inputs = x[row : row + 1, :length].copy(), lengths[row : row + 1], self._rows(states, [row])
                self._apply(Tick([advance], [length]), slots[row : row + 1], *inputs, self._run(*inputs))
        else:
            self._queued -= advances[0].remaining
            self._end(advances[0])
            if not advances[0].done.cancelled():
                advances[0].done.set_exception(self._problem(advances[0], x.shape[1], result))

    def _rows(self, states: list[Array], rows: list[int]) -> list[Array]:
        return [np.take(state, rows, spec.batch_axis) for state, spec in zip(states, self.arena.specs, strict=True)]

    def _advanced(self, advance: Advance, y: Array) -> None:
        """Notes what one tick did for an advance: it has ended, or waits for its next tick."""
        taken = len(y)
        advance.position += taken
        self._queued -= taken
        if advance.done.cancelled():
            self._queued -= advance.remaining
            self._end(advance)
            return
        if advance.every_output:
            advance.outputs.append(y)
        if advance.remaining:
            self._waiting.append(advance)
            return
        if advance.slot != advance.home:
            self.arena.copy(advance.slot, advance.home)
        self._end(advance)
        if advance.applied:
            advance.applied()
        if not advance.every_output:
            y = y[-1:]
        elif len(advance.outputs) > 1:
            y = np.concatenate(advance.outputs)
        advance.done.set_result(y)

    def _end(self, advance: Advance) -> None:
        if advance.slot != advance.home:
            self.arena.give_back(advance.slot)

    def _problem(self, advance: Advance, steps: int, result: Result) -> Problem:
        if isinstance(result, Exception):
            log.error("model %s failed: %s", self.model.name, result)
            return ModelFailed(f"ONNX Runtime could not run model {self.model.name!r} on this request")
        first, last = advance.position, advance.position + steps - 1
        where = f"step {first}" if first == last else f"one of the steps {first} to {last}"
        return NotFinite(
            f"the model's output or next state is not finite after {where} of the request, nothing was applied: "
            f"send inputs (and states) of the size that the model was trained on",
            step=first,
        )


def _finite(y: Array, states: list[Array], lengths: NDArray[np.int32]) -> bool:
    """Says whether all outputs of valid time steps, and all next states, are finite."""
    if not all(np.isfinite(state).all() for state in states):
        return False
    if np.isfinite(y).all():
        return True
    return bool(np.isfinite(y[np.arange(y.shape[1]) < lengths[:, None]]).all())
