"""A WebSocket that answers frames, read by a task; `cellserve._sync.socket` has the same for threads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from cellserve.errors import CellserveError, ConnectionLost, UnexpectedAnswer
from cellserve.protocol.frames import Answer, Frame, PendingReplies
from cellserve.protocol.socket import OPTIONS, no_answer, not_opened, raise_if_ended, stream_url, was_lost
from cellserve.retry import Timeout


class AsyncSocket:
    """One connection, and the task that reads it."""

    def __init__(self, connection: ClientConnection, timeout: Timeout, max_answer_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        self._pending: PendingReplies[asyncio.Future[Answer]] = PendingReplies(loop.create_future)
        self._connection = connection
        self._timeout = timeout
        self._max_answer_bytes = max_answer_bytes
        self._reading = loop.create_task(self._read())

    @classmethod
    async def open(cls, url: str, headers: dict[str, str], timeout: Timeout, max_answer_bytes: int) -> AsyncSocket:
        """Connects to a server; raises ConnectionLost, or the Problem that the server answered with."""
        try:
            connection = await connect(
                stream_url(url),
                additional_headers=headers,
                open_timeout=timeout.connect,
                max_size=max_answer_bytes,
                **OPTIONS,
            )
        except (OSError, EOFError, WebSocketException) as error:
            raise not_opened(error, url) from error
        return cls(connection, timeout, max_answer_bytes)

    @property
    def has_ended(self) -> bool:
        """Whether no more frames can be sent."""
        return self._pending.ended is not None

    async def ask(self, frames: Sequence[Frame]) -> list[Answer]:
        """Sends frames and returns their answers; raises ConnectionLost, UnexpectedAnswer."""
        waiting = []
        try:
            async with asyncio.timeout(self._timeout.answer):
                for frame in frames:
                    ref, future = self._pending.expect()
                    waiting.append(future)
                    await self._connection.send(frame(ref))
                answers = [await future for future in waiting]
        except TimeoutError:
            lost = no_answer(self._timeout)
            await self.close(lost)
            raise lost from None
        except (OSError, WebSocketException) as error:
            raise was_lost(error, self._max_answer_bytes) from error
        return raise_if_ended(answers)

    async def close(self, why: CellserveError) -> None:
        """Closes the connection; whoever waits for an answer gets the error."""
        self._pending.end(why)
        await self._connection.close()
        if asyncio.current_task() is not self._reading:
            await asyncio.wait((self._reading,))

    async def _read(self) -> None:
        why: CellserveError = ConnectionLost("the server closed the socket")
        try:
            async for message in self._connection:
                self._pending.receive(message)
        except WebSocketException as error:
            why = was_lost(error, self._max_answer_bytes)
        except UnexpectedAnswer as error:
            why = error
        await self.close(why)
