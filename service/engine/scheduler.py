"""What the engine works on: advances that wait, and how the next tick is chosen among them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.state_arena import Slots
from cellserve.service.errors import Problem
from cellserve.service.idempotency import Request

Array = NDArray[Any]

_PROBE_STEPS = 8
_TICK_SECONDS = 100e-6  # what a tick costs beside the run
_ROW_SECONDS = 3e-6  # and each row of it
_FIXED_SHARE = 0.25  # of what a row costs by itself: more than that is too much to pay for what all rows share
_MOST_PADDING = 0.25


class Completion(Protocol):
    """How an advance tells its end: a future, or what needs no turn of the event loop and so must not raise."""

    def done(self) -> bool:
        """Tells whether it has ended."""

    def cancelled(self) -> bool:
        """Tells whether nobody wants it any more."""

    def set_result(self, y: Array) -> None:
        """Ends it."""

    def set_exception(self, error: BaseException) -> None:
        """Ends it."""


@dataclass(slots=True, eq=False)
class Advance:
    """Work that waits, or is under way: move the states in some slots by these time steps, each wholly or not."""

    x: Array  # [rows, time, *features]
    rows: int
    remaining: int  # time steps still to take
    slots: Slots  # [rows], what it works on: copies of its homes where it takes several ticks, until all is done
    homes: Slots  # [rows], the slots that are to have moved at the end
    every_output: bool  # whether the outputs of all time steps are wanted, or the last one's
    sink: CompletionSink | None  # keeps the sessions whose slots they are; None of slots that end with the request
    keys: Sequence[Request] | None  # by row: where it says that it starts from
    before: Sequence[dict[str, Array] | None] | None  # by row: the states before it, where y would be large
    done: asyncio.Future[Array] | Completion  # gives y: [rows, time, *outputs], or [rows, 1, *outputs]
    position: int = 0  # time steps taken
    arrived: float = field(init=False)  # in its lane, seconds of time.perf_counter
    trace: Any = field(init=False)  # the trace that it belongs to, where requests are traced
    outputs: list[Array] | None = None
    problems: dict[int, Problem] | None = None  # by row: why it has not moved
    reached: Sequence[int] = ()  # by row: the session's position after it

    @property
    def awaited(self) -> asyncio.Future[Array]:
        """What to await, where the end is not told otherwise."""
        assert isinstance(self.done, asyncio.Future)
        return self.done


class Tracing(Protocol):
    """Records the spans of requests, as far as the engine knows of them."""

    def here(self) -> Any:
        """Returns the span under way, below which others are to stand."""

    def ran(self, advances: Sequence[Advance], start: float, took: float) -> None:
        """Records a tick's run: seconds of `time.perf_counter`, and seconds."""

    def stored(self, advances: Sequence[Advance], start: float, took: float) -> None:
        """Records the write of what a tick has come to."""


Moved = tuple[Advance, Array]  # an advance that has taken all of its time steps, and its y


class CompletionSink(Protocol):
    """Keeps sessions. It comes with each advance of their slots, and learns how it ended before whoever waits for it.

    All advances of one engine's sessions have the same sink: a tick is committed and completed as one batch.
    """

    def commit(self, engine: Any, batch: Sequence[Moved]) -> Awaitable[None] | None:
        """Starts writing the new states of a batch, where that comes before its answers; None if nothing has to wait.

        Rows that the store refuses are noted in their advance's `problems`.
        """

    def completed(self, engine: Any, batch: Sequence[Moved], slots: Slots, steps: Array) -> Array:
        """Moves sessions on and lets go of them.

        Args:
            engine: Whose tick it was.
            batch: The advances.
            slots: `[rows]`, those of their slots that have moved.
            steps: `[rows]`, by how many time steps.

        Returns:
            `[rows]`, the positions after it.
        """

    def failed(self, engine: Any, advance: Advance, slots: Slots) -> None:
        """Lets go of sessions that an advance has not moved; the reasons are in its `problems`."""


@dataclass(slots=True)
class Tick:
    """One run: the advances that take part, and how many time steps each takes."""

    advances: list[Advance]
    lengths: list[int]
    dropped: list[Advance]  # nobody waits for these any more
    whole: bool = True  # whether all of them begin and end with it

    def add(self, advance: Advance, length: int) -> None:
        """Lets an advance take part."""
        self.advances.append(advance)
        self.lengths.append(length)
        self.whole = self.whole and length == advance.remaining and not advance.position

    def answers(self, y: Array) -> list[Moved]:
        """Gives the advances of a whole tick with their part of its y `[batch, time, *outputs]`."""
        answers, start = [], 0
        for advance, length in zip(self.advances, self.lengths, strict=True):
            stop = start + advance.rows
            answers.append((advance, y[start:stop, 0 if advance.every_output else length - 1 : length]))
            start = stop
        return answers

    def inputs(self) -> tuple[Array, NDArray[np.int32], Slots]:
        """Puts everything side by side: x `[batch, time, *features]`, lengths and slots `[batch]`."""
        if len(self.advances) == 1:
            advance, steps = self.advances[0], self.lengths[0]
            x = np.ascontiguousarray(advance.x[:, advance.position : advance.position + steps])
            return x, np.full(advance.rows, steps, np.int32), advance.slots
        slots = np.concatenate([advance.slots for advance in self.advances])
        longest = max(self.lengths)
        if self.whole and min(self.lengths) == longest:
            return (
                np.concatenate([advance.x for advance in self.advances]),
                np.full(len(slots), longest, np.int32),
                slots,
            )
        rows = [advance.rows for advance in self.advances]
        parts = [
            advance.x[:, advance.position : advance.position + steps]
            for advance, steps in zip(self.advances, self.lengths, strict=True)
        ]
        if min(self.lengths) == longest:
            return np.concatenate(parts), np.full(len(slots), longest, np.int32), slots
        x = np.zeros((len(slots), longest, *parts[0].shape[2:]), parts[0].dtype)
        start = 0
        for part in parts:
            x[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        return x, np.repeat(np.array(self.lengths, np.int32), rows), slots


class Lane:
    """Advances that wait, in the order of their arrival, kept apart by the time steps that they could take in a tick.

    Args:
        cost: What ticks cost.
        max_batch: Rows of a tick, at most.
        quantum: Time steps of a tick, at most.
        cheap_seconds: What a tick should not take longer than, where that costs little throughput.
    """

    def __init__(self, cost: Cost, max_batch: int, quantum: int, cheap_seconds: float) -> None:
        self._cost, self._quantum = cost, quantum
        self._room = cost.room(max_batch, quantum, cheap_seconds)
        self._buckets: dict[int, deque[Advance]] = {}  # by min(remaining, quantum); none is empty
        self._rows = np.zeros(quantum + 1, np.intp)  # that wait, by the same
        self.waiting = 0

    def append(self, advance: Advance) -> None:
        """Queues an advance, or queues it again when it has had a tick."""
        advance.arrived = perf_counter()
        steps = advance.remaining
        if steps > self._quantum:
            steps = self._quantum
        bucket = self._buckets.get(steps)
        if bucket is None:
            self._buckets[steps] = bucket = deque()
        bucket.append(advance)
        self._rows[steps] += advance.rows
        self.waiting += 1

    def plan(self) -> tuple[int, int]:
        """Gives the next tick's time steps and about how many rows it will have."""
        if len(self._buckets) == 1:
            (steps,) = self._buckets
        else:
            steps = self._cost.best_steps(self._rows, self._room)
        return steps, min(int(self._rows[steps:].sum()), int(self._room[steps]))

    def take(self, steps: int) -> Tick:
        """Takes the next tick's advances out; there may be none, where all that waited was cancelled.

        The one that has waited longest takes part always. Others join that can take as many time steps or more, the
        shortest first; those that can take nearly as many are padded, as far as that costs less than it gains.
        """
        tick = Tick([], [], [])
        room = int(self._room[steps])
        if len(self._buckets) == 1:
            self._fill(tick, steps, steps, room)
            return tick
        oldest = min(self._buckets, key=lambda key: self._buckets[key][0].arrived)
        room -= self._fill(tick, oldest, steps, 1)
        worth = self._cost.worth_padding(steps)
        longer = sorted(key for key in self._buckets if key >= steps)
        shorter = sorted((key for key in self._buckets if worth <= key < steps), reverse=True)
        for key in (*longer, *shorter):
            if room <= 0:
                break
            room -= self._fill(tick, key, steps, room)
        return tick

    def _fill(self, tick: Tick, key: int, steps: int, room: int) -> int:
        """Moves advances of a bucket to a tick while there is room, the first in any case; gives their rows."""
        bucket, rows = self._buckets[key], 0
        while bucket and rows < room and (rows + bucket[0].rows <= room or not tick.advances):
            advance = bucket.popleft()
            self._rows[key] -= advance.rows
            self.waiting -= 1
            if advance.done.cancelled():
                tick.dropped.append(advance)
            else:
                tick.add(advance, min(advance.remaining, steps))
                rows += advance.rows
        if not bucket:
            del self._buckets[key]
        return rows


class Timed(Protocol):
    """What can be measured."""

    def seconds(self, batch: int, time_steps: int) -> float:
        """Gives the seconds of a run."""


class Cost:
    """Predicts the seconds of a run from those measured: `factor * (call + steps * (step + rows * row))`.

    Args:
        runtime: Is measured with a few runs.
        max_batch: Rows of the largest run.
    """

    def __init__(self, runtime: Timed, max_batch: int) -> None:
        one, many, long = (runtime.seconds(rows, steps) for rows, steps in ((1, 1), (max_batch, 1), (1, _PROBE_STEPS)))
        step = max(0.0, long - one) / (_PROBE_STEPS - 1)
        self._row = max(1e-9, many - one) / max(1, max_batch - 1)
        self._step = max(0.0, step - self._row)
        self._call = max(0.0, one - self._step - self._row)
        self._factor = 1.0

    def predict(self, rows: int, steps: int) -> float:
        """Gives the seconds that a run is expected to take."""
        return self._factor * (self._call + steps * (self._step + rows * self._row))

    def room(self, max_batch: int, quantum: int, cheap_seconds: float) -> NDArray[np.intp]:
        """Gives the rows that a tick should have at most, by its time steps: `[quantum + 1]`.

        As many as `cheap_seconds` allow, where a row then costs little more than it must; otherwise as many as bring
        it near that.
        """
        steps = np.arange(quantum + 1)
        steps[0] = 1
        fixed = _TICK_SECONDS + self._call + steps * self._step
        row = _ROW_SECONDS + steps * self._row
        cheap = np.maximum(1, (cheap_seconds - fixed) // row)
        enough = np.where(fixed / cheap <= _FIXED_SHARE * row, cheap, np.ceil(fixed / (_FIXED_SHARE * row)))
        return np.clip(enough, 1, max_batch).astype(np.intp)

    def best_steps(self, rows: NDArray[np.intp], room: NDArray[np.intp]) -> int:
        """Gives the time steps of the tick that does most in a second.

        Args:
            rows: `[quantum + 1]`, rows that wait, by the time steps that they can take.
            room: `[quantum + 1]`, rows that may take part, by the time steps of the tick.
        """
        steps = np.arange(len(rows))
        taking = np.minimum(rows[::-1].cumsum()[::-1], room)
        fixed = _TICK_SECONDS + self._call + steps * self._step
        return int(np.argmax(taking * steps / (fixed + taking * (_ROW_SECONDS + steps * self._row))))

    def worth_padding(self, steps: int) -> int:
        """Gives how many time steps a row must take at least to be padded to so many.

        It would cost more in a tick of its own.
        """
        return steps - int(min(_MOST_PADDING * steps, (_TICK_SECONDS + self._call) / (2 * self._row)))

    def learn(self, rows: int, steps: int, seconds: float) -> None:
        """Takes the seconds that a run took into account, slowly: one run that was interrupted says little."""
        expected = self.predict(rows, steps)
        if expected > 0:
            self._factor *= min(1.25, max(0.8, 1 + 0.1 * (seconds / expected - 1)))
