"""The arena: what one model's slots hold, in contiguous arrays: one array a state tensor, one row a slot.

What a session has beside its state stands in columns too, so that a tick moves hundreds of sessions at a time.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import StateSpec

Array = NDArray[Any]
Slots = NDArray[np.intp]

_FIRST_ROWS = 64


class Arena:
    """Rows of states that are taken and given back; grows on demand by doubling.

    Args:
        states: The signature's states, each kept as `[capacity, *shape]`.
        limit: Rows, at most.
    """

    def __init__(self, states: tuple[StateSpec, ...], limit: int) -> None:
        self.specs = states
        self.limit = limit
        self.capacity = min(_FIRST_ROWS, limit)
        # np.zeros takes memory only as rows are written, so that doubling costs address space, not memory.
        self._arrays = [np.zeros((self.capacity, *spec.shape), spec.dtype) for spec in states]
        self._orders = [_batch_first(spec) for spec in states]
        self.position = np.zeros(self.capacity, np.int64)  # of a session: how often it has changed
        self.used = np.full(self.capacity, np.inf)  # of a session: seconds of the table's clock; of no session: never
        self.held = np.zeros(self.capacity, bool)  # of a session: whether something that changes it is under way
        self._free: deque[int] = deque(range(self.capacity))

    @property
    def row_bytes(self) -> int:
        """Bytes of one slot's states."""
        return sum(array[0].nbytes for array in self._arrays)

    @property
    def taken(self) -> int:
        """Slots in use."""
        return self.capacity - len(self._free)

    def take(self) -> int | None:
        """Takes a slot, its states zero; gives None where all that may be are in use."""
        if not self._free and not self._grow():
            return None
        return self._free.popleft()

    def take_many(self, count: int) -> Slots | None:
        """Takes so many slots, as `take` does; gives None, and takes none, where there are not so many."""
        while len(self._free) < count:
            if not self._grow():
                return None
        return np.array([self._free.popleft() for _ in range(count)], np.intp)

    def give_back(self, slots: Slots) -> None:
        """Frees slots; their states are zeroed now, so that they can never be seen in another session."""
        for array in self._arrays:
            array[slots] = 0
        self._free.extend(slots.tolist())

    def free(self) -> None:
        """Lets go of all memory; no slot may be in use, and none can be taken any more."""
        self._arrays = [array[:0].copy() for array in self._arrays]
        self.position, self.used, self.held = self.position[:0], self.used[:0], self.held[:0]
        self._free.clear()
        self.capacity = self.limit = 0

    def gather(self, slots: Slots) -> list[Array]:
        """Copies the states of some slots: one `[len(slots), *shape]` a state (batch at the state's batch axis)."""
        return [
            array[slots] if spec.batch_axis == 0 else _gathered(array, slots, spec)
            for array, spec in zip(self._arrays, self.specs, strict=True)
        ]

    def scatter(self, slots: Slots, states: list[Array]) -> None:
        """Writes the states of some slots, as `gather` gives them."""
        for array, order, rows in zip(self._arrays, self._orders, states, strict=True):
            array[slots] = rows if order is None else rows.transpose(order)

    def read(self, slot: int) -> dict[str, Array]:
        """Copies one slot's states, by name."""
        return {spec.name: array[slot, ...].copy() for spec, array in zip(self.specs, self._arrays, strict=True)}

    @property
    def names(self) -> list[str]:
        """The states' names."""
        return [spec.name for spec in self.specs]

    def read_many(self, slots: Slots) -> dict[str, Array]:
        """Copies the states of some slots, by name: `[len(slots), *shape]`."""
        return {spec.name: array[slots] for spec, array in zip(self.specs, self._arrays, strict=True)}

    def write_many(self, slots: Slots, states: dict[str, Array]) -> None:
        """Sets the states of some slots, as `read_many` gives them."""
        for spec, array in zip(self.specs, self._arrays, strict=True):
            array[slots] = states[spec.name]

    def pack(self, slots: Slots) -> list[bytes]:
        """Copies the states of some slots, each slot's one after the other, as bytes."""
        parts = [array[slots].reshape(len(slots), -1).view(np.uint8) for array in self._arrays]
        return [row.tobytes() for row in np.concatenate(parts, axis=1)]

    def write(self, slot: int, states: dict[str, Array] | None) -> None:
        """Sets one slot's states, by name; None for zeros."""
        for spec, array in zip(self.specs, self._arrays, strict=True):
            array[slot] = 0 if states is None else states[spec.name]

    def copy(self, sources: Slots, targets: Slots) -> None:
        """Copies the states of some slots to as many others."""
        for array in self._arrays:
            array[targets] = array[sources]

    def _grow(self) -> bool:
        capacity = min(self.limit, self.capacity * 2)
        if capacity == self.capacity:
            return False
        for place, array in enumerate(self._arrays):
            larger = np.zeros((capacity, *array.shape[1:]), array.dtype)
            larger[: self.capacity] = array
            self._arrays[place] = larger
        self.position = np.append(self.position, np.zeros(capacity - self.capacity, np.int64))
        self.used = np.append(self.used, np.full(capacity - self.capacity, np.inf))
        self.held = np.append(self.held, np.zeros(capacity - self.capacity, bool))
        self._free.extend(range(self.capacity, capacity))
        self.capacity = capacity
        return True


def _batch_first(spec: StateSpec) -> tuple[int, ...] | None:
    """Gives the order of axes that brings a state's batch axis to the front; None where it is there."""
    axis, rank = spec.batch_axis, 1 + len(spec.shape)
    return None if axis == 0 else (axis, *range(axis), *range(axis + 1, rank))


def _gathered(array: Array, slots: Slots, spec: StateSpec) -> Array:
    """Copies rows to where the batch axis is not the first.

    Part by part: at 256 x 2 x 128 that takes 11 microseconds, two copies of the whole 200, most of it for fresh memory.
    """
    before, behind = spec.shape[: spec.batch_axis], spec.shape[spec.batch_axis :]
    rows = np.empty((*before, len(slots), *behind), array.dtype)
    for place in itertools.product(*map(range, before)):
        rows[place] = array[(slots, *place)]
    return rows
