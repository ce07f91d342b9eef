"""Steps under way that nobody awaits: they pass their outcome to a callback within the tick, and may be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.pending import Pending
from cellserve.service.errors import Problem, Stale
from cellserve.service.idempotency import Request
from cellserve.service.sessions.session import Session

Array = NDArray[Any]


class StepResult(NamedTuple):
    """The result of a step."""

    y: Array  # [time, *outputs], time is 1 where the last output was wanted
    position: int  # after it
    replayed: bool = False  # it had been applied before


class BatchStepResult(NamedTuple):
    """The result of a step of several sessions, by row."""

    y: Array  # [sessions, time, *outputs]
    positions: Array  # [sessions], after it
    problems: dict[int, Problem]  # why a session has not moved
    replayed: set[int]  # rows that had been applied before


class Resubmitting(Protocol):
    """The writer, as far as a pending step needs it."""

    async def submit(self, session: Session, x: Array, every_output: bool, key: Request | None = None) -> StepResult:
        """Steps a session, whatever it takes."""

    async def retry_stale(
        self, sessions: Sequence[Session], x: Array, keys: Sequence[Request] | None, result: BatchStepResult
    ) -> None:
        """Steps those of a batch again that were found changed elsewhere."""


class _Retrying(Pending):
    """A step that is submitted again where its session was found changed elsewhere."""

    __slots__ = ("retry",)

    def __init__(self) -> None:
        super().__init__()
        self.retry: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        """Drops what has not been computed; the callback is not called then."""
        super().cancel()
        if self.retry is not None:
            self.retry.cancel()


class PendingStep(_Retrying):
    """A step of one session under way.

    Args:
        writer: Submits it again where its session was found changed elsewhere.
        session: The session.
        on_done: Called with itself and the result or the error, within the tick; it must not raise.
    """

    __slots__ = ("_on_done", "_session", "_writer")

    def __init__(
        self, writer: Resubmitting, session: Session, on_done: Callable[[PendingStep, StepResult | Exception], None]
    ) -> None:
        super().__init__()
        self._writer, self._session, self._on_done = writer, session, on_done

    def set_result(self, y: Array) -> None:
        """Completes it."""
        self._state = 1
        self._on_done(self, StepResult(y[0], self.advance.reached[0]))

    def set_exception(self, error: BaseException) -> None:
        """Completes it, or starts it again."""
        self._state = 1
        if isinstance(error, Stale):
            self.retry = asyncio.get_running_loop().create_task(self._again())
        elif isinstance(error, Exception):
            self._on_done(self, error)

    async def _again(self) -> None:
        advance = self.advance
        key = None if advance.keys is None else advance.keys[0]
        outcome: StepResult | Exception
        try:
            outcome = await self._writer.submit(self._session, advance.x[0], advance.every_output, key)
        except Exception as error:
            outcome = error
        self._on_done(self, outcome)


class PendingBatch(_Retrying):
    """A step of several sessions under way.

    Args:
        writer: Submits it again where its session was found changed elsewhere.
        sessions: The sessions.
        on_done: Called with itself and the result or the error, within the tick; it must not raise.
    """

    __slots__ = ("_on_done", "_sessions", "_writer")

    def __init__(
        self,
        writer: Resubmitting,
        sessions: Sequence[Session],
        on_done: Callable[[PendingBatch, BatchStepResult | Exception], None],
    ) -> None:
        super().__init__()
        self._writer, self._sessions, self._on_done = writer, sessions, on_done

    def set_result(self, y: Array) -> None:
        """Completes it, or starts some of its sessions again."""
        self._state = 1
        result = BatchStepResult(y, np.array(self.advance.reached), self.advance.problems or {}, set())
        if result.problems and any(isinstance(problem, Stale) for problem in result.problems.values()):
            self.retry = asyncio.get_running_loop().create_task(self._again(result))
        else:
            self._on_done(self, result)

    def set_exception(self, error: BaseException) -> None:
        """Completes it: the problem of its only row."""
        if isinstance(error, Problem):
            model, x = self._sessions[0].model, self.advance.x
            self.set_result(model.outputs.zeros(*x.shape[:2]))
        elif isinstance(error, Exception):
            self._state = 1
            self._on_done(self, error)

    async def _again(self, result: BatchStepResult) -> None:
        try:
            await self._writer.retry_stale(self._sessions, self.advance.x, None, result)
        except Exception as error:
            self._on_done(self, error)
        else:
            self._on_done(self, result)
