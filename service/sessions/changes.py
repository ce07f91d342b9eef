"""What all changes of sessions go through: locks a session, queues its work, records the change, releases the lock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.pending import Pending
from cellserve.service.engine.state_arena import Slots
from cellserve.service.engine.work import Finished, WorkItem
from cellserve.service.errors import StaleSession, StepInFlight
from cellserve.service.idempotency import AppliedChange, IdempotencyKey, resolve
from cellserve.service.sessions.locks import Lease
from cellserve.service.sessions.session import Session
from cellserve.service.sessions.stores.protocol import SessionStore, States

Array = NDArray[Any]
T = TypeVar("T")

# Bytes. Larger answers are not kept for replay; the states before the step are, and the answer is computed again.
_LARGE_ANSWER = 4096


@dataclass(slots=True)
class LockedChange:
    """A change whose session is locked and refreshed."""

    lease: Lease
    applied: AppliedChange | None  # the earlier change, if this one is its repetition


class SessionChanges:
    """What all changes of a store's sessions go through. It is the completion sink of all steps of sessions.

    Args:
        store: Keeps the sessions.
    """

    def __init__(self, store: SessionStore) -> None:
        self._store, self._table = store, store.table
        self.in_flight: set[Session] = set()  # sessions in which a change with a key waits or runs
        self.replays = 0  # repeated changes that were answered again, so far

    @asynccontextmanager
    async def locked(
        self, session: Session, key: IdempotencyKey | None, waits: bool = False
    ) -> AsyncIterator[LockedChange]:
        """Locks a session for one change and refreshes it; releases the lock at the end unless it is handed over.

        Args:
            session: The session.
            key: The change's idempotency key, if it states its position.
            waits: Whether to wait for another change with a key, rather than to refuse this one while one is in flight.

        Raises:
            SessionGone, StepInFlight, PositionConflict, SessionWentBack: As `submit` does.
            StaleSession: The session must be looked up again.
        """
        self._check_alive(session)
        claims = key is not None and not waits
        lease = Lease()
        if claims:
            self._claim(session)
        claimed = claims
        try:
            async with self._table.locks[session.engine].locked(session, lease):
                if claims:
                    # The refresh may take a round trip and find this change wrong; until it is known to be right, it
                    # must not cause another one to be refused.
                    self.in_flight.discard(session)
                    claimed = False
                self._check_alive(session)
                await self._store.refresh(session, key)
                applied = None if key is None else resolve(session.position, session.applied, key)
                if applied is not None:
                    self.replays += 1
                    self._table.touch(session)
                elif claims:
                    self.in_flight.add(session)
                    claimed = True
                yield LockedChange(lease, applied)
        finally:
            if claimed and not lease.handed_over:
                self.in_flight.discard(session)

    def _claim(self, session: Session) -> None:
        if session in self.in_flight:
            raise in_flight_error(session)
        self.in_flight.add(session)

    async def retrying(self, session: Session, attempt: Callable[[Session], Awaitable[T]]) -> T:
        """Attempts a change, and starts it again whenever the session was changed elsewhere."""
        while True:
            try:
                return await attempt(session)
            except StaleSession:
                session = await self._store.fetch(session.owner, session.id)

    async def write_state(
        self,
        session: Session,
        states: States | None,
        key: IdempotencyKey | None,
        moves: int = 1,
        before: States | None = None,
    ) -> None:
        """Writes the state of a locked session; the arguments are those of `SessionStore.write_state`."""
        await self._store.write_state(session, states, key, moves, before)
        self._table.touch(session)

    def enqueue_part(
        self, session: Session, change: LockedChange, x: Array, key: IdempotencyKey, before: States
    ) -> WorkItem:
        """Enqueues a step of a locked session as part of a larger change; completing the step releases the lock.

        Args:
            session: The session.
            change: The change for which it is locked.
            x: `[time, *features]`, validated.
            key: The idempotency key of the larger change.
            before: The states before the larger change, to compute the answer to its repetition from.
        """
        item = self._enqueue(session.engine, [session], [key], session.slots, x[None], False, before=[before])
        change.lease.hand_over()
        return item

    # Completion sink

    def commit(self, engine: Engine, batch: Sequence[Finished]) -> Awaitable[None] | None:
        """Starts writing the results of steps to the store."""
        return self._store.commit(engine, batch)

    def completed(self, engine: Engine, batch: Sequence[Finished], slots: Slots, steps: Array) -> Array:
        """Advances the positions of sessions, records the answers of changes with a key, and releases the locks."""
        arena = engine.arena
        positions: Array = arena.position[slots] + steps
        arena.position[slots] = positions
        self._table.touch_slots(engine, slots)
        for item, y in batch:
            if item.idempotency_keys is not None:
                self._record(engine, item, y)
        self._release(engine, slots)
        return positions

    def failed(self, engine: Engine, item: WorkItem, slots: Slots) -> None:
        """Releases the locks of sessions that a step has not advanced."""
        if item.idempotency_keys is not None:
            self.in_flight.difference_update(self._table.by_slot[engine][slot] for slot in slots.tolist())
        self._release(engine, slots)

    def _record(self, engine: Engine, item: WorkItem, y: Array) -> None:
        """Stores with each session that advanced what is needed to answer a repetition of its change."""
        assert item.idempotency_keys is not None
        of_slot, problems = self._table.by_slot[engine], item.errors_by_row or ()
        for row, slot in enumerate(item.target_slots.tolist()):
            if row not in problems:
                session = of_slot[slot]
                self.in_flight.discard(session)
                before = None if item.states_before is None else item.states_before[row]
                answer = y[row].copy() if item.states_before is None else None
                session.applied = AppliedChange(item.idempotency_keys[row], session.position, answer, before)

    # Helpers

    def _release(self, engine: Engine, slots: Slots) -> None:
        self._table.locks[engine].release(slots)

    def _enqueue(
        self,
        engine: Engine,
        sessions: Sequence[Session],
        keys: Sequence[IdempotencyKey] | None,
        slots: Slots,
        x: Array,
        return_all_outputs: bool,
        done: Pending | None = None,
        before: Sequence[States] | None = None,
    ) -> WorkItem:
        """Enqueues a step of locked sessions; completing it releases their locks."""
        if keys is not None and before is None:
            arena = engine.arena
            size = engine.model.outputs.step_bytes * (x.shape[1] if return_all_outputs else 1)
            if size > max(_LARGE_ANSWER, arena.row_bytes):
                before = [arena.read(session.slot) for session in sessions]
        try:
            item = engine.submit(slots, x, return_all_outputs, done, self, keys, before, sessions[0].client)
        except BaseException:
            self._release(engine, slots)
            raise
        if keys is not None:
            self.in_flight.update(sessions)
        return item

    def _check_alive(self, session: Session) -> None:
        if not session.alive:
            raise self._store.not_found_error(session.owner, session.id)


def in_flight_error(session: Session) -> StepInFlight:
    """Builds the error for a change with a position while another one is in flight."""
    return StepInFlight(
        "position: another change with a position is in flight in the session: "
        "wait for its answer, or repeat the same request in a second",
        position=session.position,
    )
