"""The writer: the only code that locks sessions, changes them, records what was changed, and releases them.

A change goes through: lock, refresh, resolve the idempotency key, enqueue, commit, record, release, complete. A step
enqueues work at the engine, which hands the session back to the writer as its completion sink; a change of the state
itself is committed while the lock is held. A commit that finds the session changed elsewhere starts again.
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
from cellserve.service.engine.scheduler import Advance, Moved
from cellserve.service.engine.state_arena import Slots
from cellserve.service.errors import Problem, Stale, StepInFlight
from cellserve.service.idempotency import Applied, Request, check
from cellserve.service.sessions.locks import Lease
from cellserve.service.sessions.pending import BatchStepResult, PendingBatch, PendingStep, StepResult
from cellserve.service.sessions.session import Session
from cellserve.service.sessions.stores.protocol import SessionStore, States

Array = NDArray[Any]
T = TypeVar("T")

_LARGE_ANSWER = 4096  # bytes: of a larger answer the states before it are kept, from which it is computed again
_is_alive = attrgetter("alive")


@dataclass(slots=True)
class Turn:
    """A session's lock, held for one change."""

    lease: Lease
    applied: Applied | None  # of a change that has been applied before: its answer


class SessionWriter:
    """Changes the sessions of a store, each by one change at a time, in order of arrival.

    It is the completion sink of all steps of sessions.

    Args:
        store: Keeps them.
    """

    def __init__(self, store: SessionStore) -> None:
        self._store, self._table = store, store.table
        self.in_flight: set[Session] = set()  # in which a change with a key waits or is under way
        self.replays = 0  # changes that had been applied before and were answered again, so far

    # Steps

    def try_submit(
        self,
        session: Session,
        x: Array,
        every_output: bool,
        key: Request | None,
        on_done: Callable[[PendingStep, StepResult | Exception], None],
    ) -> PendingStep | None:
        """Starts a step at once, or returns None where it has to wait for something: then `submit` does.

        Args:
            session: The session.
            x: `[time, *features]`, checked.
            every_output: Whether the outputs of all time steps are wanted, or the last one's.
            key: Where it starts from.
            on_done: Called with itself and the result or the error, within the tick; it must not raise.

        Raises:
            SessionGone: It has ended since it was looked up; its slot may be another's by now.
            StepInFlight: Another change with a position is under way.
            PositionConflict, SessionWentBack: It does not start where the session is.
            QueueFull: Too much is waiting.
        """
        pending = PendingStep(self, session, on_done)
        advance = self._start(session, x, every_output, key, pending)
        if advance is None:
            return None
        pending.advance = advance
        return pending

    def try_submit_many(
        self,
        sessions: Sequence[Session],
        slots: Slots,
        x: Array,
        on_done: Callable[[PendingBatch, BatchStepResult | Exception], None],
    ) -> PendingBatch | None:
        """Starts a step of different live sessions at once; returns None where one is locked, or for more than a batch.

        Args:
            sessions: The sessions, of one model.
            slots: Their slots.
            x: `[sessions, time, *features]`, checked.
            on_done: Called with itself and the result or the error, within the tick; it must not raise.

        Raises:
            QueueFull: Too much is waiting.
        """
        engine = sessions[0].engine
        if len(slots) > engine.max_batch or not self._store.all_current(sessions):
            return None
        if not self._table.locks[engine].try_acquire(slots):
            return None
        pending = PendingBatch(self, sessions, on_done)
        pending.advance = self._enqueue(engine, sessions, None, slots, x, True, pending)
        return pending

    async def submit(self, session: Session, x: Array, every_output: bool, key: Request | None = None) -> StepResult:
        """Steps a session when those before have had their turn; all time steps are one unit.

        Args:
            session: The session.
            x: `[time, *features]`, checked.
            every_output: Whether the outputs of all time steps are wanted, or the last one's.
            key: Where it starts from; then it is applied once, however often it is sent.

        Raises:
            SessionGone: It was deleted meanwhile.
            StepInFlight: Another change with a position is under way.
            PositionConflict, SessionWentBack: It does not start where the session is.
            NotFinite: The outputs or the next state would not be finite.
        """

        async def attempt(session: Session) -> StepResult:
            advance = self._start(session, x, every_output, key)
            if advance is None:
                async with self.locked(session, key) as turn:
                    if turn.applied is None:
                        advance = self._enqueue_one(session, x, every_output, key)
                        turn.lease.hand_over()
                if advance is None:
                    assert turn.applied is not None
                    return await self._replay(session, turn.applied, x, every_output)
            y = await advance.awaited
            return StepResult(y[0], advance.reached[0])

        return await self.retrying(session, attempt)

    async def submit_many(
        self, sessions: Sequence[Session], slots: Slots, x: Array, keys: Sequence[Request] | None = None
    ) -> BatchStepResult:
        """Steps different sessions of one model by as many time steps each, when those before have had their turn.

        Args:
            sessions: The sessions.
            slots: Their slots.
            x: `[sessions, time, *features]`.
            keys: Where each starts from; then each is applied once, however often it is sent.
        """
        engine, count = sessions[0].engine, len(sessions)
        y = engine.model.outputs.zeros(*x.shape[:2])
        result = BatchStepResult(y, np.zeros(count, np.int64), {}, set())
        rows = await self._lock_many(engine, sessions, slots, keys, result)
        locked = set(rows)  # rows that are not the engine's yet
        under_way: list[tuple[Sequence[int], Advance]] = []
        replays: list[tuple[int, Applied]] = []
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
                    under_way.append((part, self._enqueue(engine, mine, part_keys, slots[own], x[own], True)))
                except Problem as problem:
                    result.problems.update(dict.fromkeys(part, problem))
        finally:
            left = [row for row in locked if sessions[row].alive]
            if left:
                self._release(engine, slots[left])
        for part, advance in under_way:
            own = slice(part.start, part.stop) if isinstance(part, range) else part
            try:
                y[own] = await advance.awaited
            except Problem as problem:
                result.problems[part[0]] = problem
            result.problems.update({part[row]: problem for row, problem in (advance.problems or {}).items()})
            result.positions[own] = advance.reached
        for row, applied in replays:
            await self._fill(result, row, self._replay(sessions[row], applied, x[row], True))
        await self.retry_stale(sessions, x, keys, result)
        return result

    async def submit_versions(
        self, sessions: Sequence[Session], slots: Slots, x: Array, keys: Sequence[Request] | None = None
    ) -> BatchStepResult:
        """Steps sessions of several versions, whose inputs and outputs are alike, as `submit_many` those of one."""
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
        self, sessions: Sequence[Session], x: Array, keys: Sequence[Request] | None, result: BatchStepResult
    ) -> None:
        """Steps the sessions of a batch again that were found changed elsewhere, and mends the batch's result."""
        for row in [row for row, problem in result.problems.items() if isinstance(problem, Stale)]:
            del result.problems[row]
            key = None if keys is None else keys[row]
            await self._fill(result, row, self.submit(sessions[row], x[row], True, key))

    # Other changes

    async def set_state(self, session: Session, states: States | None, key: Request | None = None) -> tuple[int, bool]:
        """Sets a session's state, to zeros where it is None, when those before have had their turn.

        Returns:
            The position after it, and whether it had been applied before.

        Raises:
            SessionGone, StepInFlight, PositionConflict, SessionWentBack: As `submit` does.
        """

        async def attempt(session: Session) -> tuple[int, bool]:
            async with self.locked(session, key) as turn:
                if turn.applied is not None:
                    return turn.applied.reached, True
                await self.write_state(session, states, key)
                return session.position, False

        return await self.retrying(session, attempt)

    async def write_state(
        self, session: Session, states: States | None, key: Request | None, moves: int = 1, before: States | None = None
    ) -> None:
        """Sets the state of a session that is locked; the arguments are those of `SessionStore.write_state`."""
        await self._store.write_state(session, states, key, moves, before)
        self._table.touch(session)

    def enqueue_part(self, session: Session, turn: Turn, x: Array, key: Request, before: States) -> Advance:
        """Enqueues a step of a session that is locked, as one part of a larger change; its end releases the session.

        Args:
            session: The session.
            turn: Its lock.
            x: `[time, *features]`.
            key: Of the larger change.
            before: The states before that, from which its repetition is computed as far as it has come.
        """
        advance = self._enqueue(session.engine, [session], [key], session.slots, x[None], False, before=[before])
        turn.lease.hand_over()
        return advance

    @asynccontextmanager
    async def locked(self, session: Session, key: Request | None, waits: bool = False) -> AsyncIterator[Turn]:
        """Holds a session's lock, refreshed, for one change; releases it at the end unless the lease is handed over.

        Args:
            session: The session.
            key: Of the change, where it says where it starts from.
            waits: Whether it waits for another change with a key, rather than being refused while one is under way.

        Raises:
            SessionGone, StepInFlight, PositionConflict, SessionWentBack: As `submit` does.
            Stale: The session is to be looked up again.
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
                    # A refresh may take a round trip; what it finds wrong must not refuse the change that is right.
                    self.in_flight.discard(session)
                    claimed = False
                self._check_alive(session)
                await self._store.refresh(session, key)
                applied = None if key is None else check(session.position, session.applied, key)
                if applied is not None:
                    self.replays += 1
                    self._table.touch(session)
                elif claims:
                    self.in_flight.add(session)
                    claimed = True
                yield Turn(lease, applied)
        finally:
            if claimed and not lease.handed_over:
                self.in_flight.discard(session)

    def _claim(self, session: Session) -> None:
        if session in self.in_flight:
            raise _in_flight(session)
        self.in_flight.add(session)

    async def retrying(self, session: Session, attempt: Callable[[Session], Awaitable[T]]) -> T:
        """Attempts a change, again from the start for as long as the session is found changed elsewhere."""
        while True:
            try:
                return await attempt(session)
            except Stale:
                session = await self._store.find(session.owner, session.id)

    # Completion sink

    def commit(self, engine: Engine, batch: Sequence[Moved]) -> Awaitable[None] | None:
        """Starts writing what steps have come to."""
        return self._store.commit(engine, batch)

    def completed(self, engine: Engine, batch: Sequence[Moved], slots: Slots, steps: Array) -> Array:
        """Moves sessions on, records the answers of changes with a key, and releases them."""
        arena = engine.arena
        positions: Array = arena.position[slots] + steps
        arena.position[slots] = positions
        self._table.touch_slots(engine, slots)
        for advance, y in batch:
            if advance.keys is not None:
                self._record(engine, advance, y)
        self._release(engine, slots)
        return positions

    def failed(self, engine: Engine, advance: Advance, slots: Slots) -> None:
        """Releases sessions that a step has not moved."""
        if advance.keys is not None:
            self.in_flight.difference_update(self._table.by_slot[engine][slot] for slot in slots.tolist())
        self._release(engine, slots)

    def _record(self, engine: Engine, advance: Advance, y: Array) -> None:
        """Keeps with each session that has moved what a repetition of its change is answered."""
        assert advance.keys is not None
        of_slot, problems = self._table.by_slot[engine], advance.problems or ()
        for row, slot in enumerate(advance.homes.tolist()):
            if row not in problems:
                session = of_slot[slot]
                self.in_flight.discard(session)
                before = None if advance.before is None else advance.before[row]
                answer = y[row].copy() if advance.before is None else None
                session.applied = Applied(advance.keys[row], session.position, answer, before)

    def _release(self, engine: Engine, slots: Slots) -> None:
        self._table.locks[engine].release(slots)

    # Parts of the above

    def _start(
        self, session: Session, x: Array, every_output: bool, key: Request | None, done: Pending | None = None
    ) -> Advance | None:
        """Locks a session and enqueues a step of it; returns None where it has to wait, or was applied before."""
        self._check_alive(session)
        locks = self._table.locks[session.engine]
        if locks.is_locked(session.slot):
            if key is not None and session in self.in_flight:
                raise _in_flight(session)
            return None
        if not self._store.is_current(session, key):
            return None
        if key is not None and check(session.position, session.applied, key) is not None:
            return None
        locks.lock(session.slot)
        return self._enqueue_one(session, x, every_output, key, done)

    def _enqueue_one(
        self, session: Session, x: Array, every_output: bool, key: Request | None, done: Pending | None = None
    ) -> Advance:
        keys = None if key is None else [key]
        return self._enqueue(session.engine, (session,), keys, session.slots, x[None], every_output, done)

    def _enqueue(
        self,
        engine: Engine,
        sessions: Sequence[Session],
        keys: Sequence[Request] | None,
        slots: Slots,
        x: Array,
        every_output: bool,
        done: Pending | None = None,
        before: Sequence[States] | None = None,
    ) -> Advance:
        """Enqueues a step of locked sessions, which its end releases."""
        if keys is not None and before is None:
            arena = engine.arena
            size = engine.model.outputs.step_bytes * (x.shape[1] if every_output else 1)
            if size > max(_LARGE_ANSWER, arena.row_bytes):
                before = [arena.read(session.slot) for session in sessions]
        try:
            advance = engine.submit(slots, x, every_output, done, self, keys, before)
        except BaseException:
            self._release(engine, slots)
            raise
        if keys is not None:
            self.in_flight.update(sessions)
        return advance

    async def _lock_many(
        self,
        engine: Engine,
        sessions: Sequence[Session],
        slots: Slots,
        keys: Sequence[Request] | None,
        result: BatchStepResult,
    ) -> Sequence[int]:
        """Locks sessions; returns the rows of those that are locked, and notes why the others are not."""
        rows: Sequence[int] = range(len(sessions))
        claimed: list[Session] = []
        if keys is not None:
            rows = [row for row in rows if sessions[row] not in self.in_flight]
            result.problems.update({row: _in_flight(one) for row, one in enumerate(sessions) if one in self.in_flight})
            claimed = [sessions[row] for row in rows]
            self.in_flight.update(claimed)
        try:
            rows = self._living(sessions, rows, result)
            if len(rows) == len(sessions):
                await self._table.locks[engine].acquire(sessions, slots)
            elif rows:
                await self._table.locks[engine].acquire([sessions[row] for row in rows], slots[rows])
            return self._living(sessions, rows, result)
        finally:
            self.in_flight.difference_update(claimed)

    def _living(self, sessions: Sequence[Session], rows: Sequence[int], result: BatchStepResult) -> Sequence[int]:
        """Returns the rows whose sessions are alive, and notes that the others are gone."""
        if all(map(_is_alive, sessions)):
            return rows
        ended = [row for row in rows if not sessions[row].alive]
        result.problems.update({row: self._store.missing(sessions[row].owner, sessions[row].id) for row in ended})
        return [row for row in rows if sessions[row].alive]

    async def _resolve_many(
        self,
        sessions: Sequence[Session],
        keys: Sequence[Request] | None,
        rows: Sequence[int],
        result: BatchStepResult,
    ) -> tuple[list[int], list[tuple[int, Applied]]]:
        """Refreshes locked sessions; returns the rows to apply, and those that have been applied before."""
        to_apply: list[int] = []
        replays: list[tuple[int, Applied]] = []
        for row in rows:
            session, key = sessions[row], None if keys is None else keys[row]
            try:
                if not self._store.is_current(session, key):
                    await self._store.refresh(session, key)
                applied = None if key is None else check(session.position, session.applied, key)
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

    async def _fill(self, result: BatchStepResult, row: int, step: Awaitable[StepResult]) -> None:
        """Takes the result of one session's step into a batch's."""
        try:
            alone = await step
        except Problem as problem:
            result.problems[row] = problem
            return
        result.y[row], result.positions[row] = alone.y, alone.position
        if alone.replayed:
            result.replayed.add(row)

    async def _replay(self, session: Session, applied: Applied, x: Array, every_output: bool) -> StepResult:
        """Returns the answer of a step that has been applied before."""
        y = applied.y
        if y is None:
            with session.engine.scratch([applied.before]) as slots:
                y = (await session.engine.submit(slots, x[None], every_output).awaited)[0]
        return StepResult(y, applied.reached, True)

    def _check_alive(self, session: Session) -> None:
        if not session.alive:
            raise self._store.missing(session.owner, session.id)


def _in_flight(session: Session) -> StepInFlight:
    return StepInFlight(
        "position: a change with a position is under way in the session: "
        "wait for its answer, or send the same again in a second",
        position=session.position,
    )
