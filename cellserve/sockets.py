"""A WebSocket that answers exchanges, read by a thread or by a task."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from typing import Any

from websockets.asyncio.client import ClientConnection as AsyncConnection
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from cellserve.errors import CellserveError, ConnectionLost, UnexpectedAnswer, problem_of_body
from cellserve.frames import Answer, Exchange, Replies
from cellserve.retry import Timeout, retry_after

_CLOSE_SECONDS = 1  # for the other end to say goodbye too
_OPTIONS: dict[str, Any] = {  # of both kinds of sockets
    "compression": None,  # float32 hardly shrinks
    "max_size": None,
    "max_queue": None,  # whoever sends ahead without reading would wait for itself
    "close_timeout": _CLOSE_SECONDS,
}


class Socket:
    """One socket, and the thread that reads it."""

    def __init__(self, url: str, headers: dict[str, str], timeout: Timeout) -> None:
        self.replies: Replies[Future[Answer]] = Replies(Future)
        self._timeout = timeout
        try:
            # Not `with`: it is closed elsewhere. websockets 17 wants it entered, before that it may be.
            self._socket: ClientConnection = connect(
                _address(url), additional_headers=headers, open_timeout=timeout.connect, **_OPTIONS
            ).__enter__()
        except (OSError, EOFError, WebSocketException) as error:
            raise _refused(error, url) from error
        threading.Thread(target=self._read, name="cellserve stream", daemon=True).start()

    def ask(self, wanted: Exchange) -> list[Answer]:
        """Sends frames and gives their answers; raises ConnectionLost, UnexpectedAnswer."""
        waiting = []
        for frame in wanted.frames:
            ref, waiter = self.replies.expect()
            waiting.append(waiter)
            try:
                self._socket.send(frame(ref))
            except (OSError, WebSocketException) as error:
                raise ConnectionLost(f"the socket was lost: {error}") from error
        deadline = time.monotonic() + self._timeout.answer
        try:
            answers = [waiter.result(max(0, deadline - time.monotonic())) for waiter in waiting]
        except TimeoutError:
            self.close(ConnectionLost(f"no answer within {self._timeout.answer:g} seconds"))
            answers = [waiter.result() for waiter in waiting]
        return _sound(answers)

    def close(self, why: CellserveError) -> None:
        """Closes it, and tells all who wait."""
        self.replies.end(why)
        self._socket.close()

    def _read(self) -> None:
        why: CellserveError = ConnectionLost("the server closed the socket")
        try:
            for message in self._socket:
                self.replies.take(message)
        except WebSocketException as error:
            why = ConnectionLost(f"the socket was lost: {error}")
        except UnexpectedAnswer as error:
            why = error
        self.close(why)


class AsyncSocket:
    """One socket, and the task that reads it."""

    def __init__(self, socket: AsyncConnection, timeout: Timeout) -> None:
        loop = asyncio.get_running_loop()
        self.replies: Replies[asyncio.Future[Answer]] = Replies(loop.create_future)
        self._socket = socket
        self._timeout = timeout
        self._reading = loop.create_task(self._read())

    @classmethod
    async def opened(cls, url: str, headers: dict[str, str], timeout: Timeout) -> AsyncSocket:
        """Opens one."""
        try:
            socket = await connect_async(
                _address(url), additional_headers=headers, open_timeout=timeout.connect, **_OPTIONS
            )
        except (OSError, EOFError, WebSocketException) as error:
            raise _refused(error, url) from error
        return cls(socket, timeout)

    async def ask(self, wanted: Exchange) -> list[Answer]:
        """Sends frames and gives their answers; raises ConnectionLost, UnexpectedAnswer."""
        waiting = []
        try:
            async with asyncio.timeout(self._timeout.answer):
                for frame in wanted.frames:
                    ref, waiter = self.replies.expect()
                    waiting.append(waiter)
                    await self._socket.send(frame(ref))
                answers = [await waiter for waiter in waiting]
        except TimeoutError:
            lost = ConnectionLost(f"no answer within {self._timeout.answer:g} seconds")
            await self.close(lost)
            raise lost from None
        except (OSError, WebSocketException) as error:
            raise ConnectionLost(f"the socket was lost: {error}") from error
        return _sound(answers)

    async def close(self, why: CellserveError) -> None:
        """Closes it, and tells all who wait."""
        self.replies.end(why)
        await self._socket.close()
        if asyncio.current_task() is not self._reading:
            await asyncio.wait((self._reading,))

    async def _read(self) -> None:
        why: CellserveError = ConnectionLost("the server closed the socket")
        try:
            async for message in self._socket:
                self.replies.take(message)
        except WebSocketException as error:
            why = ConnectionLost(f"the socket was lost: {error}")
        except UnexpectedAnswer as error:
            why = error
        await self.close(why)


def _address(url: str) -> str:
    return "ws" + url.removeprefix("http") + "/stream"


def _refused(error: Exception, url: str) -> CellserveError:
    """Gives what to raise where a socket could not be opened."""
    if isinstance(error, InvalidStatus):
        response = error.response
        wait = retry_after(response.headers.get("retry-after"))
        return problem_of_body(response.status_code, bytes(response.body or b""), wait)
    return ConnectionLost(f"{url}: {str(error) or type(error).__name__}")


def _sound(answers: list[Answer]) -> list[Answer]:
    """Gives answers back, or raises what ended the socket before they came."""
    for answer in answers:
        if isinstance(answer, ConnectionLost | UnexpectedAnswer):
            raise answer
    return answers
