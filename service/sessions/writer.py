"""The writer: the only code that locks sessions, changes them, records the changes, and releases the locks.

A change goes through: lock, refresh, resolve the idempotency key, enqueue, commit, record, release, complete. A step
enqueues a work item at the engine, which returns it to the writer as its completion sink; a state write is committed
while the lock is held. If the commit finds that the session was changed elsewhere, the change starts again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.pending import Pending
from cellserve.service.engine.state_arena import Slots
from cellserve.service.engine.work import Finished, WorkItem
from cellserve.service.errors import Problem, StaleSession, StepInFlight
from cellserve.service.idempotency import AppliedChange, IdempotencyKey, resolve
from cellserve.service.sessions.locks import Lease
from cellserve.service.sessions.pending_steps import BatchStepResult, PendingBatch, PendingStep, StepResult
from cellserve.service.sessions.session import Session
from cellserve.service.sessions.stores.protocol import SessionStore, States

Array = NDArray[Any]
T = TypeVar("T")

# Bytes. Larger answers are not kept for replay; the states before the step are, and the answer is computed again.
_LARGE_ANSWER = 4096
_is_alive = attrgetter("alive")


@dataclass(slots=True)
class LockedChange:
    """A change whose session is locked and refreshed."""

    lease: Lease
    applied: AppliedChange | None  # the earlier change, if this one is its repetition


class SessionWriter:
    """Changes the sessions of a store, each session by one change at a time, in order of arrival.

    It is the completion sink of all steps of sessions.

    Args:
        store: Keeps the sessions.
    """

    def __init__(self, store: SessionStore) -> None:
        self._store, self._table = store, store.table
        self.in_flight: set[Session] = set()  # sessions in which a change with a key waits or runs
        self.replays = 0  # repeated changes that were answered again, so far

    # Steps

    def try_submit(
        self,
        session: Session,
        x: Array,
        return_all_outputs: bool,
        key: IdempotencyKey | None,
        on_done: Callable[[PendingStep, StepResult | Exception], None],
    ) -> PendingStep | None:
        """Starts a step at once; returns None if it would have to wait for something: use `submit` then.

        Args:
            session: The session.
            x: `[time, *features]`, validated.
            return_all_outputs: Return the outputs of all time steps, or only the last one.
            key: The idempotency key, if the step states its position.
            on_done: Called within the tick with the pending step and the result or the error; it must not raise.

        Raises:
            SessionGone: The session has ended since it was looked up.
            StepInFlight: Another change with a position is in flight.
            PositionConflict, SessionWentBack: The session is not at the key's position.
            QueueFull: Too much work is waiting.
        """
        pending = PendingStep(self, session, on_done)
        item = self._start(session, x, return_all_outputs, key, pending)
        if item is None:
            return None
        pending.item = item
        return pending

    def try_submit_many(
        self,
        sessions: Sequence[Session],
        slots: Slots,
        x: Array,
        on_done: Callable[[PendingBatch, BatchStepResult | Exception], None],
    ) -> PendingBatch | None:
        """Starts a step of different live sessions at once; returns None if one is locked, or if a batch is exceeded.

        Args:
            sessions: The sessions, all of one model.
            slots: Their slots.
            x: `[sessions, time, *features]`, validated.
            on_done: Called within the tick with the pending batch and the result or the error; it must not raise.

        Raises:
            QueueFull: Too much work is waiting.
        """
        engine = sessions[0].engine
        if len(slots) > engine.max_batch or not self._store.all_current(sessions):
            return None
        if not self._table.locks[engine].try_acquire(slots):
            return None
        pending = PendingBatch(self, sessions, on_done)
        pending.item = self._enqueue(engine, sessions, None, slots, x, True, pending)
        return pending

    async def submit(
        self, session: Session, x: Array, return_all_outputs: bool, key: IdempotencyKey | None = None
    ) -> StepResult:
        """Steps a session after the changes that came before; all time steps are applied, or none.

        Args:
            session: The session.
            x: `[time, *features]`, validated.
            return_all_outputs: Return the outputs of all time steps, or only the last one.
            key: The idempotency key; with one, the step is applied once, however often it is sent.

        Raises:
            SessionGone: The session has ended.
            StepInFlight: Another change with a position is in flight.
            PositionConflict, SessionWentBack: The session is not at the key's position.
            NotFinite: The outputs or the next state would not be finite.
        """

        async def attempt(session: Session) -> StepResult:
            item = self._start(session, x, return_all_outputs, key)
            if item is None:
                async with self.locked(session, key) as change:
                    if change.applied is None:
                        item = self._enqueue_one(session, x, return_all_outputs, key)
                        change.lease.hand_over()
                if item is None:
                    assert change.applied is not None
                    return await self._replay(session, change.applied, x, return_all_outputs)
            y = await item.awaited
            return StepResult(y[0], item.final_positions[0])

        return await self.retrying(session, attempt)

    async def submit_many(
        self, sessions: Sequence[Session], slots: Slots, x: Array, keys: Sequence[IdempotencyKey] | None = None
    ) -> BatchStepResult:
        """Steps different sessions of one model by the same number of time steps, each after its earlier changes.

        Args:
            sessions: The sessions.
            slots: Their slots.
            x: `[sessions, time, *features]`, validated.
            keys: By row, the idempotency key; with one, the step is applied once, however often it is sent.
        """
        engine, count = sessions[0].engine, len(sessions)
        y = engine.model.outputs.zeros(*x.shape[:2])
        result = BatchStepResult(y, np.zeros(count, np.int64), {}, set())
        rows = await self._lock_many(engine, sessions, slots, keys, result)
        locked = set(rows)  # rows whose locks the engine does not own yet
        submitted: list[tuple[Sequence[int], WorkItem]] = []
        replays: list[tuple[int, AppliedChange]] = []
        try:
            if keys is not None or not self._store.all_current(sessions):
                rows, replays = await self._resolve_many(sessions, keys, rows, result)
            for start in range(0, len(rows), engine.max_batch):
                part = rows[start : start + engine.max_batch]
                own: Any = slice(part.start, part.stop) if isinstance(part, range) else part
                part_keys = None if keys is None else [keys[row] for row in part]
                locked.difference_update(part)
                try:
                    mine = [sessions[row] for row in part]
                    submitted.append((part, self._enqueue(engine, mine, part_keys, slots[own], x[own], True)))
                except Problem as problem:
                    result.problems.update(dict.fromkeys(part, problem))
        finally:
            left = [row for row in locked if sessions[row].alive]
            if left:
                self._release(engine, slots[left])
        for part, item in submitted:
            own = slice(part.start, part.stop) if isinstance(part, range) else part
            try:
                y[own] = await item.awaited
            except Problem as problem:
                result.problems[part[0]] = problem
            result.problems.update({part[row]: problem for row, problem in (item.errors_by_row or {}).items()})
            result.positions[own] = item.final_positions
        for row, applied in replays:
            await self._merge_result(result, row, self._replay(sessions[row], applied, x[row], True))
        await self.retry_stale(sessions, x, keys, result)
        return result

    async def submit_versions(
        self, sessions: Sequence[Session], slots: Slots, x: Array, keys: Sequence[IdempotencyKey] | None = None
    ) -> BatchStepResult:
        """Steps sessions of several model versions with the same inputs and outputs, as `submit_many` does."""
        rows_of: dict[Engine, list[int]] = {}
        for row, session in enumerate(sessions):
            rows_of.setdefault(session.engine, []).append(row)
        parts = list(rows_of.values())
        done = await asyncio.gather(
            *(
                self.submit_many(
                    [sessions[row] for row in rows],
                    slots[rows],
                    x[rows],
                    None if keys is None else [keys[row] for row in rows],
                )
                for rows in parts
            )
        )
        y = np.zeros((len(sessions), *done[0].y.shape[1:]), done[0].y.dtype)
        result = BatchStepResult(y, np.zeros(len(sessions), np.int64), {}, set())
        for rows, part in zip(parts, done, strict=True):
            result.y[rows], result.positions[rows] = part.y, part.positions
            result.problems.update({rows[row]: problem for row, problem in part.problems.items()})
            result.replayed.update(rows[row] for row in part.replayed)
        return result

    async def retry_stale(
        self, sessions: Sequence[Session], x: Array, keys: Sequence[IdempotencyKey] | None, result: BatchStepResult
    ) -> None:
        """Repeats a batch's step for the sessions that were changed elsewhere, and updates the batch's result."""
        for row in [row for row, problem in result.problems.items() if isinstance(problem, StaleSession)]:
            del result.problems[row]
            key = None if keys is None else keys[row]
            await self._merge_result(result, row, self.submit(sessions[row], x[row], True, key))

    # Other changes

    async def set_state(
        self, session: Session, states: States | None, key: IdempotencyKey | None = None
    ) -> tuple[int, bool]:
        """Writes a session's state after the changes that came before; None for zeros.

        Returns:
            The position after the write, and whether it had been applied before.

        Raises:
            SessionGone, StepInFlight, PositionConflict, SessionWentBack: As `submit` does.
        """

        async def attempt(session: Session) -> tuple[int, bool]:
            async with self.locked(session, key) as change:
                if change.applied is not None:
                    return change.applied.position_after, True
                await self.write_state(session, states, key)
                return session.position, False

        return await self.retrying(session, attempt)

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
            raise _in_flight(session)
        self.in_flight.add(session)

    async def retrying(self, session: Session, attempt: Callable[[Session], Awaitable[T]]) -> T:
        """Attempts a change, and starts it again whenever the session was changed elsewhere."""
        while True:
            try:
                return await attempt(session)
            except StaleSession:
                session = await self._store.fetch(session.owner, session.id)

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

    def _release(self, engine: Engine, slots: Slots) -> None:
        self._table.locks[engine].release(slots)

    # Helpers

    def _start(
        self,
        session: Session,
        x: Array,
        return_all_outputs: bool,
        key: IdempotencyKey | None,
        done: Pending | None = None,
    ) -> WorkItem | None:
        """Locks a session and enqueues a step; returns None if it has to wait, or was applied before."""
        self._check_alive(session)
        locks = self._table.locks[session.engine]
        if locks.is_locked(session.slot):
            if key is not None and session in self.in_flight:
                raise _in_flight(session)
            return None
        if not self._store.is_current(session, key):
            return None
        if key is not None and resolve(session.position, session.applied, key) is not None:
            return None
        locks.lock(session.slot)
        return self._enqueue_one(session, x, return_all_outputs, key, done)

    def _enqueue_one(
        self,
        session: Session,
        x: Array,
        return_all_outputs: bool,
        key: IdempotencyKey | None,
        done: Pending | None = None,
    ) -> WorkItem:
        keys = None if key is None else [key]
        return self._enqueue(session.engine, (session,), keys, session.slots, x[None], return_all_outputs, done)

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

    async def _lock_many(
        self,
        engine: Engine,
        sessions: Sequence[Session],
        slots: Slots,
        keys: Sequence[IdempotencyKey] | None,
        result: BatchStepResult,
    ) -> Sequence[int]:
        """Locks sessions; returns the rows of those that are locked, and records why the others are not."""
        rows: Sequence[int] = range(len(sessions))
        claimed: list[Session] = []
        if keys is not None:
            rows = [row for row in rows if sessions[row] not in self.in_flight]
            result.problems.update({row: _in_flight(one) for row, one in enumerate(sessions) if one in self.in_flight})
            claimed = [sessions[row] for row in rows]
            self.in_flight.update(claimed)
        try:
            rows = self._drop_ended(sessions, rows, result)
            if len(rows) == len(sessions):
                await self._table.locks[engine].acquire(sessions, slots)
            elif rows:
                await self._table.locks[engine].acquire([sessions[row] for row in rows], slots[rows])
            return self._drop_ended(sessions, rows, result)
        finally:
            self.in_flight.difference_update(claimed)

    def _drop_ended(self, sessions: Sequence[Session], rows: Sequence[int], result: BatchStepResult) -> Sequence[int]:
        """Returns the rows whose sessions are alive, and records that the others are gone."""
        if all(map(_is_alive, sessions)):
            return rows
        ended = [row for row in rows if not sessions[row].alive]
        result.problems.update(
            {row: self._store.not_found_error(sessions[row].owner, sessions[row].id) for row in ended}
        )
        return [row for row in rows if sessions[row].alive]

    async def _resolve_many(
        self,
        sessions: Sequence[Session],
        keys: Sequence[IdempotencyKey] | None,
        rows: Sequence[int],
        result: BatchStepResult,
    ) -> tuple[list[int], list[tuple[int, AppliedChange]]]:
        """Refreshes locked sessions; returns the rows to apply, and the rows that had been applied before."""
        to_apply: list[int] = []
        replays: list[tuple[int, AppliedChange]] = []
        for row in rows:
            session, key = sessions[row], None if keys is None else keys[row]
            try:
                if not self._store.is_current(session, key):
                    await self._store.refresh(session, key)
                applied = None if key is None else resolve(session.position, session.applied, key)
            except Problem as problem:
                result.problems[row] = problem
                if session.alive:
                    result.positions[row] = session.position
                continue
            if applied is None:
                to_apply.append(row)
            else:
                self.replays += 1
                self._table.touch(session)
                replays.append((row, applied))
        return to_apply, replays

    async def _merge_result(self, result: BatchStepResult, row: int, step: Awaitable[StepResult]) -> None:
        """Stores the result of one session's step in a batch's result."""
        try:
            single = await step
        except Problem as problem:
            result.problems[row] = problem
            return
        result.y[row], result.positions[row] = single.y, single.position
        if single.replayed:
            result.replayed.add(row)

    async def _replay(self, session: Session, applied: AppliedChange, x: Array, return_all_outputs: bool) -> StepResult:
        """Returns the answer of a step that was applied before."""
        y = applied.y
        if y is None:
            with session.engine.scratch([applied.states_before]) as slots:
                item = session.engine.submit(slots, x[None], return_all_outputs, client=session.client)
                y = (await item.awaited)[0]
        return StepResult(y, applied.position_after, True)

    def _check_alive(self, session: Session) -> None:
        if not session.alive:
            raise self._store.not_found_error(session.owner, session.id)


def _in_flight(session: Session) -> StepInFlight:
    return StepInFlight(
        "position: another change with a position is in flight in the session: "
        "wait for its answer, or repeat the same request in a second",
        position=session.position,
    )
