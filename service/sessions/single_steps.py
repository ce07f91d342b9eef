"""Steps of one session, and writes of its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from cellserve.service.engine.pending import Pending
from cellserve.service.engine.work import WorkItem
from cellserve.service.idempotency import AppliedChange, IdempotencyKey, resolve
from cellserve.service.sessions.changes import SessionChanges, in_flight_error
from cellserve.service.sessions.pending_steps import PendingStep, StepResult
from cellserve.service.sessions.session import Session
from cellserve.service.sessions.stores.protocol import States

Array = NDArray[Any]


class SingleSteps(SessionChanges):
    """Changes of one session at a time."""

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
            return StepResult(y[0], int(item.final_positions[0]))

        return await self.retrying(session, attempt)

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
                raise in_flight_error(session)
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

    async def _replay(self, session: Session, applied: AppliedChange, x: Array, return_all_outputs: bool) -> StepResult:
        """Returns the answer of a step that was applied before."""
        y = applied.y
        if y is None:
            with session.engine.scratch([applied.states_before]) as slots:
                item = session.engine.submit(slots, x[None], return_all_outputs, client=session.client)
                y = (await item.awaited)[0]
        return StepResult(y, applied.position_after, True)
