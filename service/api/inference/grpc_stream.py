"""The requests of one `ModelStreamInfer`: how many are under way, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from cellserve.service.api.inference.grpc_messages import Message, plain


class Stream:
    """One stream of requests: those of one sequence are done in their order, others as they come.

    Args:
        answer: Gives the answer to a request; never raises.
        window: Requests that may be under way, or have answers that wait to be read; then it is read no further.
    """

    def __init__(self, answer: Callable[[Message], Awaitable[Message]], window: int) -> None:
        self._answer, self._window = answer, asyncio.Semaphore(window)
        self._answers: asyncio.Queue[Message | None] = asyncio.Queue()
        self._under_way: set[asyncio.Task[None]] = set()
        self._last: dict[tuple[str, str], asyncio.Task[None]] = {}  # by model and sequence
        self._reading: asyncio.Task[None] | None = None

    async def answers(self, requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
        """Gives the answers, each when it is there."""
        self._reading = asyncio.create_task(self._read(requests))
        try:
            while (answer := await self._answers.get()) is not None:
                yield answer
                self._window.release()
        finally:
            for task in (self._reading, *self._under_way):
                task.cancel()

    def end(self) -> None:
        """Reads no further; what was begun is answered."""
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self, requests: AsyncIterator[Message]) -> None:
        try:
            async for request in requests:
                await self._window.acquire()
                # An index would add the parameter where it is missing.
                sequence = plain(request.parameters["sequence_id"]) if "sequence_id" in request.parameters else None
                key = request.model_name, str(sequence or "")
                task = asyncio.create_task(self._one(key, request, self._last.get(key) if key[1] else None))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
                self._last[key] = task
        except asyncio.CancelledError:
            pass
        finally:
            if self._under_way:
                await asyncio.wait(self._under_way)
            self._answers.put_nowait(None)

    async def _one(self, key: tuple[str, str], request: Message, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait((before,))
        self._answers.put_nowait(await self._answer(request))
        if self._last.get(key) is asyncio.current_task():
            del self._last[key]
