"""A tick's results on their way to a shared store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.state_arena import Arena
from cellserve.service.engine.work import Finished, WorkItem
from cellserve.service.errors import Problem, StaleSession
from cellserve.service.sessions.session import Session
from cellserve.service.sessions.stores.records import (
    NO_STAMP,
    ConditionalWrites,
    StoredAnswer,
    WriteOutcome,
    encoded_answer,
    new_stamps,
)
from cellserve.service.sessions.stores.state_bytes import pack_states

Array = NDArray[Any]


class Tick:
    """The results of a tick, and the changes in the store that they are.

    Until it is settled, its slots hold uncommitted states: they must be read again before they are used.

    Args:
        engine: The engine that ran it.
        batch: The finished work. Rows with an error are left out.
        of_slot: The engine's sessions.
    """

    def __init__(self, engine: Engine, batch: Sequence[Finished], of_slot: dict[int, Session]) -> None:
        self._batch, arena = batch, engine.arena
        items = [item for item, _ in batch]
        all_slots, steps = [item.target_slots for item in items], [item.x.shape[1] for item in items]
        counts = [item.rows for item in items]
        self._rows: list[Sequence[int]] = []  # of each item, if some are left out
        if any([item.errors_by_row for item in items]):  # noqa: C419  # faster than a generator
            self._rows = [_rows_without_error(item) for item in items]
            all_slots = [slots[rows] for slots, rows in zip(all_slots, self._rows, strict=True)]
            counts = list(map(len, self._rows))
        slots = all_slots[0] if len(all_slots) == 1 else np.concatenate(all_slots)
        positions = (arena.position[slots] + (steps[0] if len({*steps}) == 1 else np.repeat(steps, counts))).tolist()
        self.sessions = [of_slot[slot] for slot in slots.tolist()]
        expected = [session.stamp or NO_STAMP for session in self.sessions]
        for session in self.sessions:
            session.stamp = None
        answers = [b""] * len(positions)
        if any([item.idempotency_keys for item in items]):  # noqa: C419
            places = zip(self._places(), positions, strict=True)
            answers = [_answer(arena, *place, position) for place, position in places]
        keys = [session.key for session in self.sessions]
        self.writes = ConditionalWrites(keys, expected, new_stamps(positions), arena.pack(slots), answers)

    def settle(self, outcomes: Sequence[WriteOutcome | Problem]) -> bool:
        """Makes the slots that were written current, and records the others in their items; returns if all were."""
        written = WriteOutcome.WRITTEN
        for session, stamp, outcome in zip(self.sessions, self.writes.stamps, outcomes, strict=True):
            if outcome is written:
                session.stamp = stamp
        if outcomes.count(written) == len(outcomes):
            return True
        places = list(self._places())
        for one in [row for row, outcome in enumerate(outcomes) if outcome is not written]:
            (item, row, _), outcome = places[one], outcomes[one]
            problem = outcome if isinstance(outcome, Problem) else StaleSession()
            item.errors_by_row = (item.errors_by_row or {}) | {row: problem}
        return False

    def _places(self) -> Iterator[tuple[WorkItem, int, Array]]:
        """Iterates over the rows: their item, their place in it, and its y."""
        rows = self._rows or [range(item.rows) for item, _ in self._batch]
        for (item, y), own in zip(self._batch, rows, strict=True):
            for row in own:
                yield item, row, y


def _rows_without_error(item: WorkItem) -> list[int]:
    errors = item.errors_by_row or ()
    return [row for row in range(item.rows) if row not in errors]


def _answer(arena: Arena, item: WorkItem, row: int, y: Array, position: int) -> bytes:
    """Encodes what is stored to answer a repetition of a row's step."""
    if item.idempotency_keys is None:
        return b""
    key = item.idempotency_keys[row]
    if item.states_before is None:
        kind, content = StoredAnswer.ANSWER, y[row].tobytes()
    else:
        kind, content = StoredAnswer.BEFORE, pack_states(arena.specs, item.states_before[row])
    return encoded_answer(key.digest, key.position, position, kind, content)
