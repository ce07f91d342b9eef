"""Steps in flight that nobody awaits: they pass their outcome to a callback within the tick, and can be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from cellserve.service.engine.pending import Pending
from cellserve.service.errors import Problem, StaleSession
from cellserve.service.idempotency import IdempotencyKey
from cellserve.service.sessions.session import Session

Array = NDArray[Any]


class StepResult(NamedTuple):
    """The result of a step."""

    y: Array  # [time, *outputs]; time is 1 if only the last output is returned
    position: int  # after the step
    replayed: bool = False  # whether the step had been applied before


class BatchStepResult(NamedTuple):
    """The result of a step of several sessions, by row."""

    y: Array  # [sessions, time, *outputs]
    positions: Array  # [sessions], after the step
    problems: dict[int, Problem]  # rows that failed; their sessions have not advanced
    replayed: set[int]  # rows whose step had been applied before


class Resubmitter(Protocol):
    """The part of the writer that a pending step of one session uses."""

    async def submit(
        self, session: Session, x: Array, return_all_outputs: bool, key: IdempotencyKey | None = None
    ) -> StepResult:
        """Steps a session, waiting and reading it again as needed."""


class BatchResubmitter(Protocol):
    """The part of the writer that a pending step of several sessions uses."""

    async def retry_stale(
        self, sessions: Sequence[Session], x: Array, keys: Sequence[IdempotencyKey] | None, result: BatchStepResult
    ) -> None:
        """Repeats a batch's step for the sessions that were changed elsewhere."""


class _Retrying(Pending):
    """A step that is repeated if its session was changed elsewhere."""

    __slots__ = ("retry",)

    def __init__(self) -> None:
        super().__init__()
        self.retry: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        """Drops what has not been computed; the callback is not called any more."""
        super().cancel()
        if self.retry is not None:
            self.retry.cancel()

    def _finish(self, outcome: Any) -> None:
        try:
            self._on_done(self, outcome)
        except Exception as error:  # the other work of the tick goes on
            self._on_done(self, error)
        self._let_go()


class PendingStep(_Retrying):
    """A step of one session in flight.

    Args:
        writer: Repeats the step if the session was changed elsewhere.
        session: The session.
        on_done: Called within the tick with this object and the result or the error, or what it raised.
    """

    __slots__ = ("_session", "_writer")

    def __init__(
        self, writer: Resubmitter, session: Session, on_done: Callable[[PendingStep, StepResult | Exception], None]
    ) -> None:
        super().__init__()
        self._writer, self._session, self._on_done = writer, session, on_done

    def set_result(self, y: Array) -> None:
        """Completes it."""
        self._state = 1
        self._finish(StepResult(y[0], int(self.item.final_positions[0])))

    def set_exception(self, error: BaseException) -> None:
        """Completes it with an error, or repeats the step if the session was changed elsewhere."""
        self._state = 1
        if isinstance(error, StaleSession):
            self.retry = asyncio.get_running_loop().create_task(self._again())
        elif isinstance(error, Exception):
            self._finish(error)

    async def _again(self) -> None:
        item = self.item
        key = None if item.idempotency_keys is None else item.idempotency_keys[0]
        outcome: StepResult | Exception
        try:
            outcome = await self._writer.submit(self._session, item.x[0], item.return_all_outputs, key)
        except Exception as error:
            outcome = error
        self._finish(outcome)


class PendingBatch(_Retrying):
    """A step of several sessions in flight.

    Args:
        writer: Repeats the step of sessions that were changed elsewhere.
        sessions: The sessions.
        on_done: Called within the tick with this object and the result or the error, or what it raised.
    """

    __slots__ = ("_sessions", "_writer")

    def __init__(
        self,
        writer: BatchResubmitter,
        sessions: Sequence[Session],
        on_done: Callable[[PendingBatch, BatchStepResult | Exception], None],
    ) -> None:
        super().__init__()
        self._writer, self._sessions, self._on_done = writer, sessions, on_done

    def set_result(self, y: Array) -> None:
        """Completes it, or repeats the step of the sessions that were changed elsewhere."""
        self._state = 1
        result = BatchStepResult(y, self.item.final_positions, self.item.errors_by_row or {}, set())
        if result.problems and any(isinstance(problem, StaleSession) for problem in result.problems.values()):
            self.retry = asyncio.get_running_loop().create_task(self._again(result))
        else:
            self._finish(result)

    def set_exception(self, error: BaseException) -> None:
        """Completes it with an error; a problem is that of its only row."""
        if isinstance(error, Problem):
            model, x = self._sessions[0].model, self.item.x
            self.set_result(model.outputs.zeros(*x.shape[:2]))
        elif isinstance(error, Exception):
            self._state = 1
            self._finish(error)

    async def _again(self, result: BatchStepResult) -> None:
        try:
            await self._writer.retry_stale(self._sessions, self.item.x, None, result)
        except Exception as error:
            self._finish(error)
        else:
            self._finish(result)
