"""The writer: steps of batches, on top of `single_steps.py` and `changes.py`, which locks sessions and releases them.

Together they are the only code that changes a session.

A change goes through: lock, refresh, resolve the idempotency key, enqueue, commit, record, release, complete. A step
enqueues a work item at the engine, which returns it to the writer as its completion sink; a state write is committed
while the lock is held. If the commit finds that the session was changed elsewhere, the change starts again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.state_arena import Slots
from cellserve.service.engine.work import WorkItem
from cellserve.service.errors import Problem, StaleSession
from cellserve.service.idempotency import AppliedChange, IdempotencyKey, resolve
from cellserve.service.sessions.changes import in_flight_error
from cellserve.service.sessions.pending_steps import BatchStepResult, PendingBatch, StepResult
from cellserve.service.sessions.session import Session
from cellserve.service.sessions.single_steps import SingleSteps

Array = NDArray[Any]


_is_alive = attrgetter("alive")


class SessionWriter(SingleSteps):
    """Changes the sessions of a store, each session by one change at a time, in order of arrival.

    What it does with one session is in `single_steps`, what all changes have in common in `changes`; this is for steps
    of many sessions at a time.

    Args:
        store: Keeps the sessions.
    """

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
            result.problems.update(
                {row: in_flight_error(one) for row, one in enumerate(sessions) if one in self.in_flight}
            )
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
