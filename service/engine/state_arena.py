"""The arena: the states of one model's slots in contiguous arrays, one array per state tensor, one row per slot.

What else belongs to a session is kept in columns too, so that a tick can update hundreds of sessions at a time.
"""

from __future__ import annotations

import itertools
import math
import mmap
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import StateSpec

Array = NDArray[Any]
Slots = NDArray[np.intp]

_INITIAL_ROWS = 64
_SPARE_BYTES = 4 * 1024 * 1024  # states of free slots that are kept for the next burst of work
_TRIMMED_BYTES = 16 * 1024 * 1024  # states that one trim looks at: giving them back takes 8 ms


def pack_rows(states: list[Array]) -> list[bytes]:
    """Returns each row of `[rows, *shape]` arrays as bytes, those of one array after those of the other."""
    parts = [array.reshape(len(array), -1).view(np.uint8) for array in states]
    rows = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    return rows.view(f"V{rows.shape[1]}").ravel().tolist()


class Arena:
    """Slots for states, allocated and released; capacity doubles on demand.

    Args:
        states: The signature's states, each stored as `[capacity, *shape]`.
        limit: Slots, at most.
    """

    def __init__(self, states: tuple[StateSpec, ...], limit: int) -> None:
        self.specs = states
        self.limit = limit
        self.capacity = min(_INITIAL_ROWS, limit)
        self._tables = [Table(self.capacity, spec) for spec in states]
        self._arrays = [table.rows for table in self._tables]
        self._orders = [_batch_first(spec) for spec in states]
        self.position = np.zeros(self.capacity, np.int64)  # the session's position
        self.last_used = np.full(self.capacity, np.inf)  # seconds of the table's clock; infinity without a session
        self.locked = np.zeros(self.capacity, bool)  # whether a change of the session is in flight
        self.client = np.zeros(self.capacity, np.int64)  # the number of the session's client; 0 without a session
        # A stack: the slots that were freed last are taken first, so that memory is used again before more is touched.
        self._free = np.arange(self.capacity, dtype=np.intp)[::-1].copy()
        self._free_count = self.capacity
        self._least_free = self.capacity  # since the last complete trim
        self._trimmed = 0  # slots up to here have been looked at by the trim under way

    @property
    def row_bytes(self) -> int:
        """Bytes of one slot's states."""
        return sum(array[0].nbytes for array in self._arrays)

    @property
    def in_use(self) -> int:
        """Allocated slots."""
        return self.capacity - self._free_count

    def allocate(self) -> int | None:
        """Allocates a slot with zero states; returns None if the limit is reached."""
        if not self._free_count and not self._grow(1):
            return None
        return int(self._take(1)[0])

    def allocate_many(self, count: int) -> Slots | None:
        """Allocates `count` slots with zero states; returns None, and allocates none, if the limit is reached."""
        if self._free_count < count and not self._grow(count):
            return None
        return self._take(count)[::-1].copy()

    def _take(self, count: int) -> Slots:
        end = self._free_count
        self._free_count = start = end - count
        if start < self._least_free:
            self._least_free = start
        return self._free[start:end]

    def release(self, slots: Slots) -> None:
        """Frees slots and zeroes their states, so that no other session can ever see them."""
        for array in self._arrays:
            array[slots] = 0
        start = self._free_count
        self._free_count = end = start + len(slots)
        self._free[start:end] = slots[::-1]

    def trim(self) -> bool:
        """Gives a part of the memory of free slots back to the system; returns whether there is more to do.

        It does so after many slots were in use at a time that are free now.
        """
        spare = self._free_count - self._least_free
        if spare * self.row_bytes < _SPARE_BYTES:
            return False
        start, end = self._trimmed, min(self.capacity, self._trimmed + max(1, _TRIMMED_BYTES // self.row_bytes))
        is_free = np.zeros(self.capacity + 1, bool)
        is_free[self._free[: self._free_count]] = True
        edges = np.flatnonzero(np.diff(is_free[start:end], prepend=False, append=False)) + start
        for first, last in edges.reshape(-1, 2).tolist():
            for table in self._tables:
                table.discard(first, last)
        self._trimmed = end if end < self.capacity else 0
        if not self._trimmed:
            self._least_free = self._free_count
        return bool(self._trimmed)

    def close(self) -> None:
        """Frees all memory. No slot may be in use; none can be allocated any more."""
        self._arrays = [array[:0].copy() for array in self._arrays]
        self._tables.clear()
        self.position, self.last_used = self.position[:0], self.last_used[:0]
        self.locked, self.client = self.locked[:0], self.client[:0]
        self._free = self._free[:0].copy()
        self.capacity = self.limit = self._free_count = self._least_free = 0

    def gather(self, slots: Slots) -> Any:
        """Copies the states of slots: `[len(slots), *shape]` per state, with the batch at its batch axis."""
        return [
            array.take(slots, 0) if spec.batch_axis == 0 else _gathered(array, slots, spec)
            for array, spec in zip(self._arrays, self.specs, strict=True)
        ]

    def scatter(self, slots: Slots, states: Any) -> None:
        """Writes the states of slots, in the layout that `gather` returns."""
        for array, order, rows in zip(self._arrays, self._orders, states, strict=True):
            array[slots] = rows if order is None else rows.transpose(order)

    def scatter_rows(self, slots: Slots, states: Any, rows: list[int]) -> None:
        """Writes the states of some rows of a batch: `slots[rows]`."""
        if rows:
            taken = [np.take(state, rows, spec.batch_axis) for state, spec in zip(states, self.specs, strict=True)]
            self.scatter(slots[rows], taken)

    def restore(self, slots: Slots, before: Any, rows: list[int]) -> None:
        """Writes the states of some rows of a batch as `gather` returned them."""
        self.scatter_rows(slots, before, rows)

    def done(self, states: Any) -> None:
        """Takes back what `gather` returned: here, nothing."""

    def read(self, slot: int) -> dict[str, Array]:
        """Copies one slot's states, by name."""
        return {spec.name: array[slot, ...].copy() for spec, array in zip(self.specs, self._arrays, strict=True)}

    def pack(self, slots: Slots) -> list[bytes]:
        """Returns the states of each slot as bytes, one state after the other."""
        return pack_rows([array[slots] for array in self._arrays])

    def write(self, slot: int, states: dict[str, Array] | None) -> None:
        """Writes one slot's states, by name; None for zeros."""
        for spec, array in zip(self.specs, self._arrays, strict=True):
            array[slot] = 0 if states is None else states[spec.name]

    def copy(self, sources: Slots, targets: Slots) -> None:
        """Copies the states of slots to as many others."""
        for array in self._arrays:
            array[targets] = array[sources]

    def _grow(self, count: int) -> bool:
        """Doubles the capacity until `count` slots are free; returns False, and does nothing, if the limit is lower."""
        capacity = self.capacity
        while capacity < self.limit and self._free_count + capacity - self.capacity < count:
            capacity = min(self.limit, 2 * capacity)
        added = capacity - self.capacity
        if self._free_count + added < count:
            return False
        self._arrays.clear()  # tables cannot grow while there are views of them
        for table in self._tables:
            table.grow(capacity)
        self._arrays = [table.rows for table in self._tables]
        self.position = np.append(self.position, np.zeros(added, np.int64))
        self.last_used = np.append(self.last_used, np.full(added, np.inf))
        self.locked = np.append(self.locked, np.zeros(added, bool))
        self.client = np.append(self.client, np.zeros(added, np.int64))
        free = np.empty(capacity, np.intp)
        free[:added] = np.arange(capacity - 1, self.capacity - 1, -1)
        free[added : added + self._free_count] = self._free[: self._free_count]
        self._free, self.capacity = free, capacity
        self._free_count += added
        self._least_free += added
        return True


class Table:
    """Rows of one state: `[capacity, *shape]`, in pages of their own, which can be given back to the system one by one.

    Args:
        capacity: Its rows.
        spec: The state.
    """

    def __init__(self, capacity: int, spec: StateSpec) -> None:
        self._spec = spec
        self._row_bytes = math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        self._pages = _map(capacity * self._row_bytes)
        self.rows: Array = self._view(capacity)

    def grow(self, capacity: int) -> None:
        """Appends rows of zeros."""
        before = len(self.rows)
        del self.rows
        try:
            # The system moves the pages' addresses (mremap), which takes no time even for gigabytes.
            self._pages.resize(capacity * self._row_bytes)
        except (BufferError, OSError, SystemError):  # something else refers to the rows, or the system cannot do it
            rows = self._view(before)
            self._pages = _map(capacity * self._row_bytes)
            self._view(before)[:] = rows
        self.rows = self._view(capacity)

    def discard(self, first: int, last: int) -> None:
        """Gives the pages that lie within rows of zeros, from `first` up to `last`, back: they stay zeros."""
        start = -(-first * self._row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        size = last * self._row_bytes // mmap.PAGESIZE * mmap.PAGESIZE - start
        if size > 0 and sys.platform == "linux":  # elsewhere the pages may keep what they had
            self._pages.madvise(mmap.MADV_DONTNEED, start, size)

    def _view(self, capacity: int) -> Array:
        rows = np.frombuffer(self._pages, self._spec.dtype, capacity * math.prod(self._spec.shape))
        return rows.reshape(capacity, *self._spec.shape)


def _map(size: int) -> mmap.mmap:
    """Returns anonymous memory of zeros, which takes space as it is written to."""
    if sys.platform == "win32":
        return mmap.mmap(-1, max(1, size))
    return mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _batch_first(spec: StateSpec) -> tuple[int, ...] | None:
    """Returns the axis order that moves a state's batch axis to the front; None if it is there already."""
    axis, rank = spec.batch_axis, 1 + len(spec.shape)
    return None if axis == 0 else (axis, *range(axis), *range(axis + 1, rank))


def _gathered(array: Array, slots: Slots, spec: StateSpec) -> Array:
    """Copies rows into an array whose batch axis is not the first.

    It copies part by part: 11 microseconds at 256 x 2 x 128, against 200 for two copies of the whole, most of which go
    into fresh memory.
    """
    before, behind = spec.shape[: spec.batch_axis], spec.shape[spec.batch_axis :]
    rows = np.empty((*before, len(slots), *behind), array.dtype)
    for place in itertools.product(*map(range, before)):
        rows[place] = array[(slots, *place)]
    return rows
