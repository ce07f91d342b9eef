"""The outgoing messages of a WebSocket: in order, at once if possible, for at most a window of frames."""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import Send

from cellserve.service.api.bounded_websocket import BoundedWebSocket


class SendQueue:
    """Answers to a client that may read slowly.

    Args:
        send: ASGI's `send`.
        fast: The connection, if it can send without awaiting.
        window: The largest number of unanswered frames.
    """

    def __init__(self, send: Send, fast: BoundedWebSocket | None, window: int) -> None:
        self._send, self._fast, self._window = send, fast, window
        self.in_flight = 0  # frames that are not fully answered
        self._messages: deque[tuple[bytes, bool, bool]] = deque()  # message, is text, is the last one for its frame
        self._writing = False  # whether `write` is sending a message
        self._wakeup: asyncio.Future[None] | None = None  # what `write` waits for when there is nothing to send
        self._window_open: asyncio.Future[None] | None = None  # what `wait_for_room` waits for

    @property
    def is_full(self) -> bool:
        """Whether the window is full, so that no further frame may start."""
        return self.in_flight >= self._window

    def put(self, message: bytes, text: bool, last: bool = True) -> None:
        """Sends or queues a message; `last` says whether it completes the answer to a frame."""
        if self._fast and not self._messages and not self._writing and self._fast.send_now(message, text):
            if last:
                self._frame_answered()
            return
        self._messages.append((message, text, last))
        if self._wakeup and not self._wakeup.done():
            self._wakeup.set_result(None)

    async def write(self) -> None:
        """Sends queued messages until it is cancelled; blocks while the client does not read, so the window fills."""
        loop = asyncio.get_running_loop()
        while True:
            while self._messages:
                message, text, last = self._messages.popleft()
                self._writing = True
                content = {"text": message.decode()} if text else {"bytes": message}
                await self._send({"type": "websocket.send", **content})
                self._writing = False
                if last:
                    self._frame_answered()
            self._wakeup = loop.create_future()
            await self._wakeup

    async def wait_for_room(self, writing: asyncio.Task[None]) -> None:
        """Waits until the window has room, or the task of `write` has ended."""
        while self.is_full and not writing.done():
            self._window_open = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._window_open, writing), return_when=asyncio.FIRST_COMPLETED)

    def _frame_answered(self) -> None:
        self.in_flight -= 1
        if self._window_open and not self._window_open.done():
            self._window_open.set_result(None)
