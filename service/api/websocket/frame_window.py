"""The window of a WebSocket: how many frames may be in flight, and their answers, in order, at once if possible."""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import Send

from cellserve.service.api.connections.bounded_websocket import BoundedWebSocket


class FrameWindow:
    """Counts the frames of a client that are not answered, and sends it the answers, which it may read slowly.

    Args:
        send: ASGI's `send`.
        fast: The connection, if it can send without awaiting.
        window: The largest number of unanswered frames.
        window_bytes: The bytes of these frames and of their answers after which no further one starts.
    """

    def __init__(self, send: Send, fast: BoundedWebSocket | None, window: int, window_bytes: int) -> None:
        self._send, self._fast, self._window, self.window_bytes = send, fast, window, window_bytes
        self._in_flight = 0  # frames that are not fully answered
        self._bytes = 0  # of these frames and their answers
        # Message, is text, is the last one for its frame, and the bytes that are in flight no more when it is sent.
        self._messages: deque[tuple[bytes, bool, bool, int]] = deque()
        self._writing = False  # whether `write` is sending a message
        self._wakeup: asyncio.Future[None] | None = None  # what `write` waits for when there is nothing to send
        self._window_open: asyncio.Future[None] | None = None  # what `wait_for_room` waits for

    @property
    def is_full(self) -> bool:
        """Whether the window is full, so that no further frame may start."""
        return self._in_flight >= self._window or self._bytes >= self.window_bytes

    def begin(self, size: int) -> None:
        """Counts a frame whose answer will follow; `size` is that of both together, as far as it is known."""
        self._in_flight += 1
        self._bytes += size

    def add(self, size: int) -> None:
        """Counts bytes of an answer that were not known when its frame began."""
        self._bytes += size

    def put(self, message: bytes, text: bool, size: int | None = None) -> None:
        """Sends or queues a message.

        Args:
            message: The message.
            text: Whether it is text.
            size: All bytes that were counted for its frame, if it completes the answer; None if more will follow.
        """
        last = size is not None
        if self._fast and not self._messages and not self._writing and self._fast.send_now(message, text):
            if size is not None:
                self._frame_answered(size)
            return
        if size is None:
            self._bytes += (size := len(message))
        self._messages.append((message, text, last, size))
        if self._wakeup and not self._wakeup.done():
            self._wakeup.set_result(None)

    async def write(self) -> None:
        """Sends queued messages until it is cancelled; blocks while the client does not read, so the window fills."""
        loop = asyncio.get_running_loop()
        while True:
            while self._messages:
                message, text, last, size = self._messages.popleft()
                self._writing = True
                if self._fast:
                    await self._fast.writable.wait()
                if self._fast is None or not self._fast.send_now(message, text):
                    content = {"text": message.decode()} if text else {"bytes": message}
                    await self._send({"type": "websocket.send", **content})
                self._writing = False
                if last:
                    self._frame_answered(size)
                else:
                    self._bytes -= size
            self._wakeup = loop.create_future()
            await self._wakeup

    async def wait_for_room(self, writing: asyncio.Task[None]) -> None:
        """Waits until the window has room, or the task of `write` has ended."""
        while self.is_full and not writing.done():
            self._window_open = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._window_open, writing), return_when=asyncio.FIRST_COMPLETED)

    def _frame_answered(self, size: int) -> None:
        self._in_flight -= 1
        self._bytes -= size
        if self._window_open and not self._window_open.done():
            self._window_open.set_result(None)
