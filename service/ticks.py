"""What the engine works on: advances that wait, and how the next tick is chosen among them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arena import Slots
from service.errors import Problem
from service.runtime import Runtime

Array = NDArray[Any]

FULL_ROWS = 64  # rows that may take a whole quantum in one tick; of fewer time steps more rows may
_PROBE_STEPS = 8
_TICK_SECONDS = 60e-6  # what a tick costs beside the run


@dataclass(slots=True, eq=False)
class Advance:
    """Work that waits, or is under way: move the states in some slots by these time steps, each wholly or not."""

    x: Array  # [rows, time, *features]
    rows: int
    remaining: int  # time steps still to take
    slots: Slots  # [rows], what it works on: copies of its homes where it takes several ticks, until all is done
    homes: Slots  # [rows], the slots that are to have moved at the end
    every_output: bool  # whether the outputs of all time steps are wanted, or the last one's
    kept: bool  # whether the slots are sessions', which outlive the request
    done: asyncio.Future[Array]  # gives y: [rows, time, *outputs], or [rows, 1, *outputs]
    position: int = 0  # time steps taken
    number: int = 0  # the order of arrival in its lane
    outputs: list[Array] | None = None
    problems: dict[int, Problem] | None = None  # by row: why it has not moved
    reached: Sequence[int] = ()  # by row: the session's position after it


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
    """Advances that wait, in the order of their arrival, kept apart by the time steps of their next tick.

    Args:
        max_batch: Rows of a tick, at most; as many as make up `FULL_ROWS` whole quanta where they are long.
        quantum: Time steps of a tick, at most.
        padding: Time steps that a row may be padded by in any case.
    """

    def __init__(self, max_batch: int, quantum: int, padding: int = 0) -> None:
        self._max_batch, self._quantum, self._padding = max_batch, quantum, padding
        self._buckets: dict[int, deque[Advance]] = {}  # by min(remaining, quantum); none is empty
        self._arrivals = 0
        self.waiting = 0

    def append(self, advance: Advance) -> None:
        """Queues an advance, or queues it again when it has had a tick."""
        self._arrivals += 1
        advance.number = self._arrivals
        steps = min(advance.remaining, self._quantum)
        bucket = self._buckets.get(steps)
        if bucket is None:
            self._buckets[steps] = bucket = deque()
        bucket.append(advance)
        self.waiting += 1

    @property
    def first(self) -> tuple[int, int]:
        """Tells of the next tick, while something waits, about how many rows and time steps it will have."""
        steps, bucket = self._oldest()
        return min(max(self.waiting, bucket[0].rows), self._room(steps)), steps

    def take(self) -> Tick:
        """Chooses the next tick and takes its advances out; there may be none, where all that waited was cancelled.

        The one that has waited longest sets the number of time steps. Others join it that have as many left, or that
        would take nearly as many (three quarters) in a tick of their own: the longer ones take less than they could,
        the shorter ones are padded, also where that costs less than a tick of their own. So little padding is computed,
        and a long sequence holds a short one up for no longer than a tick.
        """
        steps, _ = self._oldest()
        tick = Tick([], [], [])
        room = self._room(steps)
        most, least = 4 * steps // 3, min(-(-3 * steps // 4), steps - self._padding)
        fitting = [key for key in self._buckets if least <= key <= most]
        for key in sorted(fitting, key=lambda key: (key != steps, -key)):
            bucket = self._buckets[key]
            while bucket and (room >= bucket[0].rows or not tick.advances):
                advance = bucket.popleft()
                self.waiting -= 1
                if advance.done.cancelled():
                    tick.dropped.append(advance)
                    continue
                tick.add(advance, min(advance.remaining, steps))
                room -= advance.rows
            if not bucket:
                del self._buckets[key]
        return tick

    def _oldest(self) -> tuple[int, deque[Advance]]:
        return min(self._buckets.items(), key=lambda item: item[1][0].number)

    def _room(self, steps: int) -> int:
        return min(self._max_batch, FULL_ROWS * self._quantum // steps)


class Cost:
    """Predicts the seconds of a run from those measured: `factor * (call + steps * (step + rows * row))`.

    Args:
        runtime: Is measured with a few runs.
        max_batch: Rows of the largest run.
    """

    def __init__(self, runtime: Runtime, max_batch: int) -> None:
        one, many, long = (runtime.seconds(rows, steps) for rows, steps in ((1, 1), (max_batch, 1), (1, _PROBE_STEPS)))
        step = max(0.0, long - one) / (_PROBE_STEPS - 1)
        self._row = max(0.0, many - one) / max(1, max_batch - 1)
        self._step = max(0.0, step - self._row)
        self._call = max(0.0, one - self._step - self._row)
        self._factor = 1.0

    def predict(self, rows: int, steps: int) -> float:
        """Gives the seconds that a run is expected to take."""
        return self._factor * (self._call + steps * (self._step + rows * self._row))

    @property
    def padding(self) -> int:
        """Time steps of padding that cost half of what a tick of one's own would."""
        return int((_TICK_SECONDS + self._call) / (2 * max(self._row, 1e-9)))

    def learn(self, rows: int, steps: int, seconds: float) -> None:
        """Takes the seconds that a run took into account, slowly: one run that was interrupted says little."""
        expected = self.predict(rows, steps)
        if expected > 0:
            self._factor *= min(1.25, max(0.8, 1 + 0.1 * (seconds / expected - 1)))
