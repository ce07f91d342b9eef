"""What one WebSocket is to be sent: at once where that can be, in order always, and never more than a window of it."""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import Send

from cellserve.service.api.fast_path import FastPathWebSocket


class SendQueue:
    """Answers on their way to a client that may read slowly.

    Args:
        send: ASGI's.
        short: The short way, where the server offers it.
        window: Frames whose answers have not been sent yet, at most.
    """

    def __init__(self, send: Send, short: FastPathWebSocket | None, window: int) -> None:
        self._send, self._short, self._window = send, short, window
        self.under_way = 0  # frames whose answers have not been sent yet
        self._messages: deque[tuple[bytes, bool, bool]] = deque()  # whether they are text, and the last of an answer
        self._writing = False  # one of them
        self._stirred: asyncio.Future[None] | None = None  # the writer waits for something to send
        self._room: asyncio.Future[None] | None = None  # the reader waits for the window to open

    @property
    def is_full(self) -> bool:
        """Whether no further frame may be begun."""
        return self.under_way >= self._window

    def put(self, message: bytes, text: bool, last: bool = True) -> None:
        """Gives an answer to be sent, the last one or not of what a frame is answered."""
        if self._short and not self._messages and not self._writing and self._short.send_now(message, text):
            if last:
                self._sent()
            return
        self._messages.append((message, text, last))
        if self._stirred and not self._stirred.done():
            self._stirred.set_result(None)

    async def write(self) -> None:
        """Sends the answers; where the client does not read them, this waits, and the window fills."""
        loop = asyncio.get_running_loop()
        while True:
            while self._messages:
                message, text, last = self._messages.popleft()
                self._writing = True
                told = {"text": message.decode()} if text else {"bytes": message}
                await self._send({"type": "websocket.send", **told})
                self._writing = False
                if last:
                    self._sent()
            self._stirred = loop.create_future()
            await self._stirred

    async def room(self, writing: asyncio.Task[None]) -> None:
        """Waits until a frame may be begun, or the writing has ended."""
        while self.is_full and not writing.done():
            self._room = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._room, writing), return_when=asyncio.FIRST_COMPLETED)

    def _sent(self) -> None:
        self.under_way -= 1
        if self._room and not self._room.done():
            self._room.set_result(None)
