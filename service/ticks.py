"""What the engine works on: advances that wait, and how the next tick is chosen among them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arena import Slots
from service.errors import Problem
from service.runtime import Runtime

Array = NDArray[Any]

_PROBE_STEPS = 8


@dataclass(slots=True, eq=False)
class Advance:
    """Work that waits, or is under way: move the states in some slots by these time steps, each wholly or not."""

    x: Array  # [rows, time, *features]
    slots: Slots  # [rows], what it works on: copies of its homes where it takes several ticks, until all is done
    homes: Slots  # [rows], the slots that are to have moved at the end
    every_output: bool  # whether the outputs of all time steps are wanted, or the last one's
    done: asyncio.Future[Array]  # gives y: [rows, time, *outputs], or [rows, 1, *outputs]
    applied: Callable[[Advance], None] | None  # told in the very moment when the states have moved
    position: int = 0  # time steps taken
    outputs: list[Array] = field(default_factory=list)
    problems: dict[int, Problem] = field(default_factory=dict)  # by row: why it has not moved

    @property
    def rows(self) -> int:
        """Slots that it moves."""
        return len(self.slots)

    @property
    def remaining(self) -> int:
        """Time steps still to take."""
        return int(self.x.shape[1]) - self.position


@dataclass(frozen=True, slots=True)
class Tick:
    """One run: the advances that take part, and how many time steps each takes."""

    advances: list[Advance]
    lengths: list[int]
    dropped: list[Advance]  # nobody waits for these any more

    def inputs(self) -> tuple[Array, NDArray[np.int32], Slots]:
        """Puts everything side by side: x `[batch, time, *features]`, lengths and slots `[batch]`."""
        if len(self.advances) == 1:
            advance, steps = self.advances[0], self.lengths[0]
            x = np.ascontiguousarray(advance.x[:, advance.position : advance.position + steps])
            return x, np.full(advance.rows, steps, np.int32), advance.slots
        slots = np.concatenate([advance.slots for advance in self.advances])
        rows = [advance.rows for advance in self.advances]
        parts = [
            advance.x[:, advance.position : advance.position + steps]
            for advance, steps in zip(self.advances, self.lengths, strict=True)
        ]
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return np.concatenate(parts), np.full(len(slots), longest, np.int32), slots
        x = np.zeros((len(slots), longest, *parts[0].shape[2:]), parts[0].dtype)
        start = 0
        for part in parts:
            x[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        return x, np.repeat(np.array(self.lengths, np.int32), rows), slots


def choose(waiting: deque[Advance], max_batch: int, quantum: int) -> Tick:
    """Chooses the next tick and takes its advances out of the queue, whose first one is wanted.

    The one that has waited longest sets the number of time steps (at most the quantum). The others join in the order of
    the queue: those with at least as many left take as many, those with a little less are padded (at most a quarter),
    the rest wait for a tick of their own length. So little padding is computed, and a long sequence holds a short one
    up for no longer than a tick.
    """
    steps = min(waiting[0].remaining, quantum)
    advances: list[Advance] = []
    lengths: list[int] = []
    passed: list[Advance] = []
    dropped: list[Advance] = []
    room = max_batch
    while waiting and room > 0:
        advance = waiting.popleft()
        length = min(advance.remaining, steps)
        if advance.done.cancelled():
            dropped.append(advance)
        elif 4 * length >= 3 * steps and advance.rows <= room:
            advances.append(advance)
            lengths.append(length)
            room -= advance.rows
        else:
            passed.append(advance)
    waiting.extendleft(reversed(passed))
    return Tick(advances, lengths, dropped)


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

    def learn(self, rows: int, steps: int, seconds: float) -> None:
        """Takes the seconds that a run took into account, slowly: one run that was interrupted says little."""
        expected = self.predict(rows, steps)
        if expected > 0:
            self._factor *= min(1.25, max(0.8, 1 + 0.1 * (seconds / expected - 1)))
