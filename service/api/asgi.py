"""Reads the body of a request and sends an answer, on plain ASGI; turns every error into a problem document."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Iterable, MutableMapping
from typing import Any, TypeVar

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from cellserve.service.api.compression import decompressed
from cellserve.service.errors import BodyTooLarge, Problem, UnsupportedMediaType
from cellserve.service.observability.request_context import get_context, problem_body

T = TypeVar("T")

log = logging.getLogger("cellserve")

_JSON = (b"content-type", b"application/json")
REPLAY = ((b"idempotent-replay", b"true"),)
RESUMABLE = "cellserve.resumable"  # in the scope of an answer that may be cut: the client can have the rest later


class ClientGone(Exception):
    """The client closed the connection before its request was whole."""


def content_type(scope: Scope) -> bytes:
    """Gives the media type that a request says its body has, without parameters; empty where it says nothing."""
    for name, value in scope["headers"]:
        if name == b"content-type":
            kind: bytes = value.partition(b";")[0].strip().lower()
            return kind
    return b""


def _content_encoding(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value != b"identity":
            encoding: bytes = value
            return encoding
    return None


def check_json(kind: bytes) -> None:
    """Raises UnsupportedMediaType where a content type is not JSON's."""
    if kind != b"application/json" and not kind.endswith(b"+json"):
        if not kind:
            raise UnsupportedMediaType("the body has no content type: send it with Content-Type: application/json")
        raise UnsupportedMediaType(
            f"the body has the content type {kind.decode('latin-1')[:100]!r}: send application/json"
        )


async def read_json_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Reads the whole body of a request that must be JSON, as it was before it was compressed.

    Raises:
        UnsupportedMediaType: The content type is another, or the content encoding.
        BodyTooLarge: There are more than `limit` bytes.
        NotJson: It cannot be decompressed.
        ClientGone: It never came whole.
    """
    check_json(content_type(scope))
    message = await receive()
    body: bytes = message.get("body", b"")
    if message["type"] != "http.request" or message.get("more_body") or len(body) > limit:
        body = await read_rest(message, scope, receive, limit)  # otherwise without a coroutine more, as nearly always
    encoding = _content_encoding(scope)
    return body if encoding is None else await decompressed(body, encoding, limit)


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Reads the whole body of a request, `limit` bytes at most; raises as `read_json_body` does."""
    body = await read_rest(await receive(), scope, receive, limit)
    encoding = _content_encoding(scope)
    return body if encoding is None else await decompressed(body, encoding, limit)


async def read_rest(message: MutableMapping[str, Any], scope: Scope, receive: Receive, limit: int) -> bytes:
    """Reads what follows the first message of a body, and gives the whole as it was sent."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit:
            raise _too_large(limit)
    parts, size = [], 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes: send it in parts", limit=limit)


class OnePerLoopIteration:
    """Lets requests through one a turn of the event loop, so that many large bodies hold up nothing that is small."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._passed = False  # one has, in this turn

    async def __call__(self) -> None:
        """Waits for its turn; the order is that of arrival."""
        loop = asyncio.get_running_loop()
        if not self._passed:
            self._passed = True
            loop.call_soon(self._next, loop)
        else:
            waiter = loop.create_future()
            self._waiting.append(waiter)
            await waiter

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():  # whose client has not gone
                waiter.set_result(None)
                loop.call_soon(self._next, loop)
                return
        self._passed = False


async def cancel_on_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Waits for work, and cancels it where the client goes first; costs a task, so it is for work that has to wait.

    Raises:
        ClientGone: The client closed the connection.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def send_json(send: Send, document: Any, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Sends a document; NumPy arrays in it are written with the fewest digits that give the same float32."""
    body = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = [_JSON, (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_body(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    """Sends an answer whole."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


class ProblemMiddleware:
    """Wraps a plain ASGI endpoint so that what it raises is answered as a problem document."""

    def __init__(self, endpoint: ASGIApp) -> None:
        self.endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        try:
            await self.endpoint(scope, receive, send)
        except ClientGone:
            pass
        except Exception as error:
            await send_problem(send, as_problem(error, scope), scope)


def as_problem(error: Exception, scope: Scope) -> Problem:
    """Gives the problem to answer with; what nobody expected goes to the log, not to the client."""
    if isinstance(error, Problem):
        return error
    about = {"request_id": get_context(scope).id}
    log.error("%s %s failed", scope.get("method", "WS"), scope["path"], exc_info=error, extra={"fields": about})
    return Problem("an error that is ours, not yours: it is in the server's log")


async def send_problem(send: Send, problem: Problem, scope: Scope) -> None:
    """Sends a problem document."""
    await send_body(send, problem.status, problem.headers(), problem_body(problem, scope))
