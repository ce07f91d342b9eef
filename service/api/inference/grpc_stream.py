"""The requests of one `ModelStreamInfer` call: their order, and how many are in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from cellserve.service.errors import Problem


class RequestStream:
    """A stream of requests: requests of one sequence run in order, all others concurrently.

    Args:
        answer: Returns the answer to a request; must not raise.
        sequence_of: Returns the model and the sequence of a request, the latter empty if there is none; must not raise.
        window: The largest number of requests whose answers are not read; then reading requests pauses.
        window_bytes: The bytes of these requests, and of their answers, at which it pauses, too.
    """

    def __init__(
        self,
        answer: Callable[[bytes], Awaitable[bytes]],
        sequence_of: Callable[[bytes], Awaitable[tuple[str, str]]],
        window: int,
        window_bytes: int,
    ) -> None:
        self._answer, self._sequence_of, self._window = answer, sequence_of, asyncio.Semaphore(window)
        self._window_bytes, self._bytes = window_bytes, 0
        self._has_room = asyncio.Event()
        self._answers: asyncio.Queue[bytes | Problem | None] = asyncio.Queue()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._last: dict[tuple[str, str], asyncio.Task[None]] = {}  # by model and sequence
        self._reading: asyncio.Task[None] | None = None

    async def answers(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yields the answers as they complete; raises the problem that the stream was refused with."""
        self._reading = asyncio.create_task(self._read(requests))
        try:
            while (answer := await self._answers.get()) is not None:
                if isinstance(answer, Problem):
                    raise answer
                size = len(answer)
                yield answer
                self._window.release()
                self._count(-size)
        finally:
            self._drop_requests()

    def end(self) -> None:
        """Stops reading requests; those in flight are still answered."""
        if self._reading is not None:
            self._reading.cancel()

    def _drop_requests(self) -> None:
        self.end()
        for task in self._in_flight:
            task.cancel()

    def refuse(self, problem: Problem) -> None:
        """Ends the stream at once, with a problem; requests in flight are dropped."""
        self._drop_requests()
        while not self._answers.empty():
            self._answers.get_nowait()
        self._answers.put_nowait(problem)

    def _count(self, size: int) -> None:
        """Adds bytes that are in flight; negative ones are not any more."""
        self._bytes += size
        if self._bytes < self._window_bytes:
            self._has_room.set()
        else:
            self._has_room.clear()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        try:
            async for request in requests:
                await self._window.acquire()
                self._count(len(request))
                key = await self._sequence_of(request)
                task = asyncio.create_task(self._one(key, request, self._last.get(key) if key[1] else None))
                self._in_flight.add(task)
                task.add_done_callback(self._in_flight.discard)
                self._last[key] = task
                await self._has_room.wait()
        except asyncio.CancelledError:
            pass
        finally:
            if self._in_flight:
                await asyncio.wait(self._in_flight)
            self._answers.put_nowait(None)

    async def _one(self, key: tuple[str, str], request: bytes, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait((before,))
        answer = await self._answer(request)
        self._count(len(answer) - len(request))
        self._answers.put_nowait(answer)
        if self._last.get(key) is asyncio.current_task():
            del self._last[key]
