"""An arena whose states stay on the device that runs the model; host memory only knows which row holds which slot.

Rows are never changed: a run reads some and writes its next states to others, and a slot then refers to its new row.
So a run that fails, or whose states are not finite, changes nothing, and slots with equal states (a fork, the copies
of a long request) share a row. A slot without a row of its own has the row of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import StateSpec
from cellserve.service.engine.state_arena import Arena, Slots, pack_rows

Array = NDArray[Any]
Rows = NDArray[np.int64]

ZEROS, RESERVED = 0, 2  # the row of zeros; the first that is not reserved
_INITIAL_ROWS = 64
_SPARE_BYTES = 4 * 1024 * 1024  # of free rows that are not worth giving back


class Tables(Protocol):
    """States in device memory, a row each: `StateTables`."""

    capacity: int

    def run(self, x: Array, lengths: NDArray[np.int32], sources: Rows, targets: Rows) -> tuple[Array, Array]:
        """Advances rows; returns y, and whether each row's next states are finite."""

    def read(self, rows: Rows) -> list[Array]:
        """Returns copies of rows in host memory."""

    def write(self, rows: Rows, states: list[Array]) -> None:
        """Writes rows."""

    def resize(self, sources: Rows) -> None:
        """Replaces the tables by others, each row of which is the row that `sources` says."""

    def close(self) -> None:
        """Frees the memory."""


@dataclass(slots=True, eq=False)
class DeviceStates:
    """The states of a batch, before and after its run: rows of tables."""

    tables: Tables
    sources: Rows  # [batch]
    targets: Rows  # [batch]

    def run(self, x: Array, lengths: NDArray[np.int32]) -> tuple[Array, Array]:
        """Advances them; returns y, and whether each row's next states are finite."""
        return self.tables.run(x, lengths, self.sources, self.targets)

    def part(self, row: int) -> DeviceStates:
        """Returns one row of the batch."""
        return DeviceStates(self.tables, self.sources[row : row + 1], self.targets[row : row + 1])


class DeviceArena(Arena):
    """Slots whose states are in device memory.

    Args:
        states: The signature's states.
        limit: Slots, at most.
        tables: Holds their states.
    """

    def __init__(self, states: tuple[StateSpec, ...], limit: int, tables: Tables) -> None:
        super().__init__((), limit)  # which has no states in host memory then
        self.specs = states
        self._tables_on_device = tables
        self._row = np.zeros(self.capacity, np.int64)  # by slot
        self._references = np.zeros(tables.capacity, np.int64)  # by row: slots and batches that refer to it
        self._free_rows: list[int] = []
        self._most_rows = 0  # in use, since the last trim
        self._resize(_INITIAL_ROWS)

    @property
    def row_bytes(self) -> int:
        """Bytes of one slot's states."""
        return sum(spec.bytes for spec in self.specs)

    @property
    def rows(self) -> int:
        """Rows of the tables that are in use."""
        return len(self._references) - RESERVED - len(self._free_rows)

    def release(self, slots: Slots) -> None:
        """Frees slots: the next that takes one sees zeros."""
        self._refer(slots, np.zeros(len(slots), np.int64))
        super().release(slots)

    def trim(self) -> bool:
        """Gives the memory of free rows back after many were in use at a time; there is never more to do."""
        most, self._most_rows = self._most_rows, self.rows
        capacity = max(_INITIAL_ROWS, RESERVED + 2 * most)
        unused = len(self._references) - capacity
        # A batch under way knows its rows by their numbers: they cannot be moved.
        under_way = self._references.sum() > np.count_nonzero(self._row)
        if not under_way and unused * self.row_bytes >= _SPARE_BYTES and unused > len(self._references) // 2:
            self._resize(capacity)
        return False

    def close(self) -> None:
        """Frees all memory."""
        super().close()
        self._tables_on_device.close()
        self._row, self._references, self._free_rows = self._row[:0], self._references[:0], []

    def gather(self, slots: Slots) -> Any:
        """Returns the rows of slots, and as many others for their next states; `done` takes both back."""
        sources = self._row[slots]
        targets = self._new_rows(len(slots))
        np.add.at(self._references, sources[sources != ZEROS], 1)
        return DeviceStates(self._tables_on_device, sources, targets)

    def scatter(self, slots: Slots, states: Any) -> None:
        """Lets slots refer to the next states of a batch."""
        self._references[states.targets] += 1
        self._refer(slots, states.targets, counted=True)

    def scatter_rows(self, slots: Slots, states: Any, rows: list[int]) -> None:
        """Lets the slots of some rows of a batch refer to their next states."""
        targets = states.targets[rows]
        self._references[targets] += 1
        self._refer(slots[rows], targets, counted=True)

    def restore(self, slots: Slots, before: Any, rows: list[int]) -> None:
        """Lets the slots of some rows of a batch refer to their states before it."""
        self._refer(slots[rows], before.sources[rows])

    def done(self, states: Any) -> None:
        """Takes the rows of a batch back that no slot refers to."""
        self._release_rows(np.concatenate([states.sources, states.targets]))

    def read(self, slot: int) -> dict[str, Array]:
        """Copies one slot's states, by name."""
        states = self._tables_on_device.read(self._row[[slot]])
        return {spec.name: state[0, ...] for spec, state in zip(self.specs, states, strict=True)}

    def pack(self, slots: Slots) -> list[bytes]:
        """Returns the states of each slot as bytes: one copy from the device, whatever their number."""
        return pack_rows(self._tables_on_device.read(self._row[slots]))

    def write(self, slot: int, states: dict[str, Array] | None) -> None:
        """Writes one slot's states, by name; None for zeros."""
        slots = np.array([slot])
        if states is None:
            self._refer(slots, np.zeros(1, np.int64))
            return
        row = self._new_rows(1)
        try:
            self._tables_on_device.write(row, [np.asarray(states[spec.name], spec.dtype)[None] for spec in self.specs])
        except BaseException:
            self._release_rows(row)
            raise
        self._refer(slots, row, counted=True)

    def copy(self, sources: Slots, targets: Slots) -> None:
        """Lets slots refer to the states of others."""
        self._refer(targets, self._row[sources])

    def _grow(self, count: int) -> bool:
        before = self.capacity
        grown = super()._grow(count)
        self._row = np.append(self._row, np.zeros(self.capacity - before, np.int64))
        return grown

    def _refer(self, slots: Slots, rows: Rows, counted: bool = False) -> None:
        """Lets slots refer to rows; `counted`: the reference is counted already."""
        if not counted:
            np.add.at(self._references, rows[rows != ZEROS], 1)
        before = self._row[slots]
        self._row[slots] = rows
        self._release_rows(before)

    def _release_rows(self, rows: Rows) -> None:
        rows = rows[rows != ZEROS]
        np.subtract.at(self._references, rows, 1)
        self._free_rows += np.unique(rows[self._references[rows] == 0]).tolist()

    def _new_rows(self, count: int) -> Rows:
        """Returns rows that nothing refers to, with a reference each."""
        if len(self._free_rows) < count:
            capacity = len(self._references)
            self._resize(max(2 * capacity, capacity + count))
        rows = np.array([self._free_rows.pop() for _ in range(count)], np.int64)
        self._references[rows] = 1
        self._most_rows = max(self._most_rows, self.rows)
        return rows

    def _resize(self, capacity: int) -> None:
        """Moves the tables to others; rows keep their numbers if they become more, and close up if fewer."""
        before = len(self._references)
        if capacity >= before:
            kept = moved = np.arange(before)
        else:
            kept = np.append(np.arange(RESERVED), RESERVED + np.flatnonzero(self._references[RESERVED:]))
            moved = np.arange(len(kept))
        sources = np.zeros(capacity, np.int64)  # new rows are copies of the row of zeros
        sources[moved] = kept
        self._tables_on_device.resize(sources)
        number = np.zeros(before, np.int64)
        number[kept] = moved
        self._row = number[self._row]
        references = np.zeros(capacity, np.int64)
        references[moved] = self._references[kept]
        self._references = references
        self._free_rows = (RESERVED + np.flatnonzero(references[RESERVED:] == 0))[::-1].tolist()
