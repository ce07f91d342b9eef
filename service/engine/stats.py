"""Numbers that an engine counts: plain ones, read when somebody asks.

To note a tick of 64 rows takes 2 to 5 µs, of one row 0.3 to 0.8; prometheus-client's own take 0.2 (a counter) to 0.5 µs
(a histogram) for each value, 30 for that tick. All of it is written in the event loop's thread alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.scheduler import Advance

SECONDS = (25e-6, 5e-5, 1e-4, 25e-5, 5e-4, 1e-3, 25e-4, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = tuple(2**power for power in range(17))
_NOTED = 4096  # values that are sorted into buckets at a time


class Distribution:
    """A histogram. Values are noted first, and sorted into buckets thousands at a time.

    Args:
        bounds: The buckets' upper bounds, ascending; each is in its bucket.
    """

    __slots__ = ("_counts", "_noted", "_sum", "bounds")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self._counts: NDArray[np.int64] = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0
        self._noted = array("d")

    def note(self, value: float) -> None:
        """Notes a value."""
        self._noted.append(value)
        if len(self._noted) >= _NOTED:
            self.read()

    def note_all(self, values: list[float]) -> None:
        """Notes some values."""
        self._noted.fromlist(values)
        if len(self._noted) >= _NOTED:
            self.read()

    def read(self) -> tuple[list[int], float]:
        """Gives how many values each bucket has, the last one those beyond all bounds, and the values' sum."""
        if self._noted:
            values = np.frombuffer(self._noted)
            self._noted = array("d")
            self._counts += np.bincount(np.searchsorted(self.bounds, values), minlength=len(self._counts))
            self._sum += float(values.sum())
        return self._counts.tolist(), self._sum


class TickCounts:
    """What one engine's ticks come to."""

    def __init__(self) -> None:
        self.rows = Distribution(_ROWS)  # of a tick
        self.queue = Distribution(SECONDS)  # of an advance, until the run of its tick
        self.run = Distribution(SECONDS)  # of a tick
        self.store = Distribution(SECONDS)  # of a tick, until what it has come to is written
        self.by_rows: dict[int, list[float]] = {}  # by rows of a tick: how many there were, and their seconds
        self.run_seconds = 0.0  # of all of them
        self.steps = 0  # that were wanted
        self.padding = 0  # that were computed beside them, where rows of a tick differ in length
        self.rerun = 0  # ticks that were run again row by row
        self.failed = 0  # ticks that could not be made

    def ran(self, advances: Sequence[Advance], rows: int, padding: int, steps: int, start: float, took: float) -> None:
        """Notes a tick's run.

        Args:
            advances: That took part.
            rows: Of the tick.
            padding: Time steps that nobody wanted, over all rows.
            steps: Time steps that were, over all rows.
            start: Seconds of `time.perf_counter`.
            took: Seconds.
        """
        self._took(rows, took)
        if len(advances) == 1:
            self.queue.note(start - advances[0].arrived)
        else:
            self.queue.note_all([start - advance.arrived for advance in advances])
        self.steps += steps
        self.padding += padding

    def ran_whole(self, rows: int, steps: int, queued: float, took: float) -> None:
        """Notes a run of whole sequences, which waited and took so many seconds."""
        self._took(rows, took)
        self.queue.note(queued)
        self.steps += steps

    def _took(self, rows: int, seconds: float) -> None:
        self.rows.note(rows)
        self.run.note(seconds)
        runs = self.by_rows.setdefault(rows, [0, 0.0])
        runs[0] += 1
        runs[1] += seconds
        self.run_seconds += seconds
