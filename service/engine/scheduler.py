"""The scheduler: queues of work items, and how the next tick is chosen among them.

A tick is one batched run. No timer waits to fill a batch: a tick starts as soon as there is work (`Engine._coalesce`
lets what has arrived join it), and what arrives meanwhile makes the next. The policy is a pure function of what waits
and of the cost model; it does no I/O.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.state_arena import Slots
from cellserve.service.engine.work import Finished, WorkItem

Array = NDArray[Any]

_PROBE_STEPS = 8
_TICK_SECONDS = 100e-6  # overhead of a tick beside the model's run
_ROW_SECONDS = 3e-6  # overhead of each row of a tick
# Fraction of a row's own cost. If the overhead of a run, divided by its rows, exceeds it, a larger batch is worth more.
_OVERHEAD_SHARE = 0.25
_SHARED_ROWS = 4  # so many rows are to share even the longest tick
_LEAST_STEPS = 32  # time steps of the longest tick, at least, however costly they are
_CUT_SECONDS = 8e-6  # overhead of a row that is cut: it takes part in one more tick
_MAX_WASTE = 0.25  # padding of a row, or the overhead of cutting it, at most: a fraction of the tick's time steps
_REMEMBERED_CLIENTS = 4096


@dataclass(slots=True)
class Tick:
    """One run: the work items that take part, and how many time steps each takes."""

    items: list[WorkItem]
    lengths: list[int]
    cancelled: list[WorkItem]  # items that were cancelled while they waited; they do not take part
    unprotected: list[WorkItem]  # items of sessions that do not end within this tick, and have no copies of their slots
    is_complete: bool = True  # whether every item starts and ends within this tick

    def take(self, item: WorkItem, steps: int) -> int:
        """Adds an item, for at most so many time steps, unless it was cancelled; returns the rows that take part."""
        if item.done.cancelled():
            self.cancelled.append(item)
            return 0
        length = item.remaining
        if length > steps:
            length = steps
            self.is_complete = False
            if item.sink is not None and item.slots is item.target_slots:
                self.unprotected.append(item)
        elif item.steps_done:
            self.is_complete = False
        self.items.append(item)
        self.lengths.append(length)
        return item.rows

    def answers(self, y: Array) -> list[Finished]:
        """Splits y `[batch, time, *outputs]` of a complete tick among its items."""
        answers, start = [], 0
        for item, length in zip(self.items, self.lengths, strict=True):
            stop = start + item.rows
            answers.append((item, y[start:stop, 0 if item.return_all_outputs else length - 1 : length]))
            start = stop
        return answers

    def inputs(self) -> tuple[Array, NDArray[np.int32], Slots]:
        """Builds the batch: x `[batch, time, *features]`, padded with zeros, lengths `[batch]` and slots `[batch]`."""
        if len(self.items) == 1:
            item, steps = self.items[0], self.lengths[0]
            x = np.ascontiguousarray(item.x[:, item.steps_done : item.steps_done + steps])
            return x, np.full(item.rows, steps, np.int32), item.slots
        slots = np.concatenate([item.slots for item in self.items])
        longest = max(self.lengths)
        if self.is_complete and min(self.lengths) == longest:
            return (
                np.concatenate([item.x for item in self.items]),
                np.full(len(slots), longest, np.int32),
                slots,
            )
        rows = [item.rows for item in self.items]
        parts = [
            item.x[:, item.steps_done : item.steps_done + steps]
            for item, steps in zip(self.items, self.lengths, strict=True)
        ]
        if min(self.lengths) == longest:
            return np.concatenate(parts), np.full(len(slots), longest, np.int32), slots
        x = np.zeros((len(slots), longest, *parts[0].shape[2:]), parts[0].dtype)
        start = 0
        for part in parts:
            x[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        return x, np.repeat(np.array(self.lengths, np.int32), rows), slots


class Bucket:
    """Waiting items with equal time steps per tick: first in, first out; by turns of clients while not all fit."""

    __slots__ = ("_by_client", "_turns", "arrived")

    def __init__(self) -> None:
        self.arrived: deque[WorkItem] = deque()  # behind all items that have been sorted
        self._by_client: dict[str, deque[WorkItem]] = {}  # sorted items; none is empty
        self._turns: deque[str] = deque()  # the clients of sorted items, the next one first

    def __bool__(self) -> bool:
        return bool(self.arrived or self._turns)

    @property
    def first(self) -> WorkItem:
        """The next item."""
        return self._by_client[self._turns[0]][0] if self._turns else self.arrived[0]

    @property
    def is_sorted(self) -> bool:
        """Whether items are sorted by client."""
        return bool(self._turns)

    def sort(self) -> int:
        """Sorts the items that have arrived by client; returns the number of clients."""
        while self.arrived:
            item = self.arrived.popleft()
            own = self._by_client.get(item.client)
            if own is None:
                self._by_client[item.client] = own = deque()
                self._turns.append(item.client)
            own.append(item)
        return len(self._turns)

    def pop(self) -> tuple[WorkItem, bool]:
        """Removes the next of the sorted items; returns it, and whether its client has more of them."""
        own = self._by_client[self._turns[0]]
        item = own.popleft()
        if not own:
            del self._by_client[self._turns.popleft()]
        return item, bool(own)

    def end_turn(self) -> None:
        """Lets the next client have its turn."""
        self._turns.rotate(-1)


class RequestQueue:
    """Waiting work items, in a bucket for each number of time steps that an item can take per tick.

    Args:
        cost: The cost model.
        max_batch: Rows of a tick, at most.
        quantum: Time steps of a tick, at most.
        cheap_seconds: Target for a tick's duration; exceeded only if a shorter tick would lose much throughput.
    """

    def __init__(self, cost: CostModel, max_batch: int, quantum: int, cheap_seconds: float) -> None:
        self._cost, self._quantum = cost, min(quantum, cost.max_steps(cheap_seconds))
        self._max_rows = cost.max_rows(max_batch, cheap_seconds)
        self._buckets: dict[int, Bucket] = {}  # by min(remaining, quantum); none is empty
        # Waiting rows, by bucket: written one by one, which takes NumPy four times as long, and read all at a time.
        self._rows = array("q", bytes(8 * (quantum + 1)))
        self._all_rows = np.frombuffer(self._rows, np.int64)
        self.waiting = 0  # waiting items
        self._ticks = 0  # ticks that were chosen among several buckets
        self._last_first: dict[str, int] = {}  # by client, the last of these ticks that took an item of it first

    def append(self, item: WorkItem) -> None:
        """Enqueues an item, or enqueues it again after a tick."""
        item.enqueued_at = perf_counter()
        steps = item.remaining
        if steps > self._quantum:
            steps = self._quantum
        bucket = self._buckets.get(steps)
        if bucket is None:
            self._buckets[steps] = bucket = Bucket()
        bucket.arrived.append(item)
        self._rows[steps] += item.rows
        self.waiting += 1

    def peek(self) -> tuple[int, int]:
        """Returns the next tick's time steps, and an estimate of its rows."""
        if len(self._buckets) == 1:
            (steps,) = self._buckets
            rows = self._rows[steps]
        else:
            steps = self._cost.best_steps(self._all_rows, self._max_rows)
            rows = int(self._all_rows[steps:].sum())
        return steps, min(rows, int(self._max_rows[steps]))

    def schedule(self, steps: int) -> Tick:
        """Removes the items of the next tick from the queue; the tick is empty if all of them were cancelled.

        The item that has waited longest always takes part; among those of several clients, the one whose client was
        not so chosen for the longest time. Items that can take `steps` time steps join it; then longer ones, where
        cutting them costs little; then shorter ones, where padding them does.
        """
        tick = Tick([], [], [], [])
        free_rows = int(self._max_rows[steps])
        if len(self._buckets) == 1:
            self._fill(tick, steps, steps, free_rows)
            return tick
        free_rows -= self._fill(tick, self._choose_first(), steps, 1)
        fewest, most = self._cost.alike(steps)
        keys = (key for key in self._buckets if fewest <= key <= most)
        for key in sorted(keys, key=lambda key: (key < steps, abs(key - steps))):
            if free_rows <= 0:
                break
            free_rows -= self._fill(tick, key, steps, free_rows)
        return tick

    def _choose_first(self) -> int:
        """Returns the bucket whose next item takes part in any case."""
        last = self._last_first
        turns = [
            (last.get((first := bucket.first).client, 0), first.enqueued_at, key)
            for key, bucket in self._buckets.items()
        ]
        _, _, key = min(turns)
        self._ticks += 1
        if len(last) >= _REMEMBERED_CLIENTS:
            last.clear()
        last[self._buckets[key].first.client] = self._ticks
        return key

    def _fill(self, tick: Tick, key: int, steps: int, free_rows: int) -> int:
        """Moves items from a bucket to a tick while they fit, the first one in any case; returns the rows moved."""
        bucket = self._buckets[key]
        if bucket.is_sorted or self._rows[key] > free_rows:
            rows = self._fill_by_turns(tick, key, steps, free_rows)
            if not bucket:
                del self._buckets[key]
            return rows
        del self._buckets[key]
        self._rows[key] = 0
        self.waiting -= len(bucket.arrived)
        return sum([tick.take(item, steps) for item in bucket.arrived])

    def _fill_by_turns(self, tick: Tick, key: int, steps: int, free_rows: int) -> int:
        """Fills a tick from a bucket by turns: in its turn, a client moves its share of the rows."""
        bucket, rows, in_turn = self._buckets[key], 0, 0
        share = max(1, free_rows // bucket.sort())
        while bucket and rows < free_rows:
            first = bucket.first
            if rows + first.rows > free_rows and tick.items and not first.done.cancelled():
                break  # it is still this client's turn in the next tick
            item, has_more = bucket.pop()
            self._rows[key] -= item.rows
            self.waiting -= 1
            moved = tick.take(item, steps)
            rows += moved
            in_turn = in_turn + moved if has_more else 0
            if in_turn >= share:
                bucket.end_turn()
                in_turn = 0
        return rows


class Profilable(Protocol):
    """Something whose run time can be measured."""

    def seconds(self, batch: int, time_steps: int) -> float:
        """Returns the seconds of a run."""


class CostModel:
    """Predicts the seconds of a run from measurements: `factor * (call + steps * (step + rows * row))`.

    Args:
        runtime: Measured with a few runs.
        max_batch: Rows of the largest run.
        quantum: Time steps of the longest tick.
    """

    def __init__(self, runtime: Profilable, max_batch: int, quantum: int) -> None:
        one, many, long = (runtime.seconds(rows, steps) for rows, steps in ((1, 1), (max_batch, 1), (1, _PROBE_STEPS)))
        step = max(0.0, long - one) / (_PROBE_STEPS - 1)
        self._row = max(1e-9, many - one) / max(1, max_batch - 1)
        self._step = max(0.0, step - self._row)
        self._call = max(0.0, one - self._step - self._row)
        self._factor = 1.0
        # All by time steps of a tick, `[quantum + 1]`: its seconds beside those of its rows, and of each row.
        self._steps = np.maximum(1, np.arange(quantum + 1))
        self._fixed = _TICK_SECONDS + self._call + self._steps * self._step
        self._per_row = _ROW_SECONDS + self._steps * self._row
        # The time steps of the shortest row that is cheaper to pad than to run in its own tick; and those that a row
        # which is cut is worth, nothing where cutting wastes too much.
        padding = np.minimum(_MAX_WASTE * self._steps, (_TICK_SECONDS + self._call) / (2 * self._row))
        self._fewest = self._steps - padding.astype(np.intp)
        cut = _CUT_SECONDS / self._row
        self._worth_if_cut = np.where(cut <= _MAX_WASTE * self._steps, self._steps - cut, 0.0)

    def predict(self, rows: int, steps: int) -> float:
        """Returns the predicted seconds of a run."""
        return self._factor * (self._call + steps * (self._step + rows * self._row))

    def max_steps(self, cheap_seconds: float) -> int:
        """Computes the time steps that a tick may have: as many as a few rows can share within `cheap_seconds`."""
        cheap = self._fixed + _SHARED_ROWS * self._per_row <= cheap_seconds
        return max(_LEAST_STEPS, int(cheap.sum()) - 1)

    def max_rows(self, max_batch: int, cheap_seconds: float) -> NDArray[np.intp]:
        """Computes the rows that a tick should have at most, by its time steps: `[quantum + 1]`.

        These are as many as fit into `cheap_seconds`, unless they are few and the overhead per row would then exceed a
        quarter of the row's own cost; in that case, as many as bring the overhead down to that.
        """
        fixed, row = self._fixed, self._per_row
        cheap = np.maximum(1, (cheap_seconds - fixed) // row)
        enough = (cheap >= _SHARED_ROWS) | (fixed / cheap <= _OVERHEAD_SHARE * row)
        return np.clip(np.where(enough, cheap, np.ceil(fixed / (_OVERHEAD_SHARE * row))), 1, max_batch).astype(np.intp)

    def best_steps(self, rows: NDArray[np.int64], max_rows: NDArray[np.intp]) -> int:
        """Computes the time steps of the tick with the highest throughput, of rows that are alike.

        Args:
            rows: `[quantum + 1]`, waiting rows, by the time steps that they can take.
            max_rows: `[quantum + 1]`, the largest batch, by the time steps of the tick.
        """
        up_to, steps_up_to = rows.cumsum(), (rows * self._steps).cumsum()
        shorter = self._fewest - 1
        longer = np.where(self._worth_if_cut, up_to[-1] - up_to, 0)
        alike = np.maximum(1, up_to - up_to[shorter] + longer)
        worth = (steps_up_to - steps_up_to[shorter] + longer * self._worth_if_cut) / alike  # of each row, in time steps
        batch = np.minimum(alike, max_rows)
        return 1 + int(np.argmax((batch * worth / (self._fixed + batch * self._per_row))[1:]))

    def alike(self, steps: int) -> tuple[int, int]:
        """Returns the fewest and the most time steps of rows that may share a tick: padded, or cut, to `steps`."""
        return int(self._fewest[steps]), len(self._steps) if self._worth_if_cut[steps] else steps

    def update(self, rows: int, steps: int, seconds: float) -> None:
        """Adapts slowly to the measured seconds of a run: a single one may have been interrupted."""
        expected = self.predict(rows, steps)
        if expected > 0:
            self._factor *= min(1.25, max(0.8, 1 + 0.1 * (seconds / expected - 1)))
