"""Plain ASGI helpers: reading request bodies, sending answers, turning errors into problem documents."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, MutableMapping
from typing import Any, TypeVar

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from cellserve.service.api.compression import decompressed
from cellserve.service.errors import BodyTooLarge, Problem, UnsupportedMediaType
from cellserve.service.observability.request_context import get_context, problem_body, route

T = TypeVar("T")

log = logging.getLogger("cellserve")

JSON = (b"content-type", b"application/json")
REPLAY = ((b"idempotent-replay", b"true"),)
RESUMABLE = "cellserve.resumable"  # a scope's key: the client can resume this answer after a disconnect


class ClientGone(Exception):
    """The client disconnected before its request was complete or answered."""


def content_type(scope: Scope) -> bytes:
    """Returns the media type of a request's `Content-Type`, without parameters; empty if it has none."""
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
    """Raises UnsupportedMediaType if a content type is not JSON."""
    if kind != b"application/json" and not kind.endswith(b"+json"):
        if not kind:
            raise UnsupportedMediaType("the body has no content type: send it with Content-Type: application/json")
        raise UnsupportedMediaType(
            f"the body has the content type {kind.decode('latin-1')[:100]!r}: send application/json"
        )


async def read_json_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Reads and decompresses the body of a request that must be JSON.

    Raises:
        UnsupportedMediaType: The content type is not JSON, or the content encoding is not supported.
        BodyTooLarge: The body has more than `limit` bytes.
        NotJson: The body cannot be decompressed.
        ClientGone: The client disconnected before the end of the body.
    """
    check_json(content_type(scope))
    message = await receive()
    body: bytes = message.get("body", b"")
    if message["type"] != "http.request" or message.get("more_body") or len(body) > limit:
        body = await read_rest(message, scope, receive, limit)  # rare: bodies in one message need no further coroutine
    encoding = _content_encoding(scope)
    return body if encoding is None else await decompressed(body, encoding, limit)


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Reads and decompresses a body of at most `limit` bytes; raises as `read_json_body` does."""
    body = await read_rest(await receive(), scope, receive, limit)
    encoding = _content_encoding(scope)
    return body if encoding is None else await decompressed(body, encoding, limit)


async def read_rest(message: MutableMapping[str, Any], scope: Scope, receive: Receive, limit: int) -> bytes:
    """Reads the messages after a body's first one; returns the whole body, not decompressed."""
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
    return BodyTooLarge(f"the body is larger than {limit} bytes: split it into several requests", limit=limit)


async def cancel_on_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Awaits work, and cancels it if the client disconnects first. It costs a task: use it for work that may wait.

    Raises:
        ClientGone: The client disconnected.
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
    """Sends a JSON document; NumPy floats are written with the fewest digits that read back as the same float32."""
    body = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = [JSON, (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_body(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    """Sends a complete answer."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def send_parts(send: Send, receive: Receive, headers: list[tuple[bytes, bytes]], parts: Iterable[bytes]) -> None:
    """Sends a large answer part by part: each is made when the client has read most of what came before.

    Raises:
        ClientGone: The client disconnected.
    """

    async def send_all() -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)  # `send` does not wait for a client that reads fast, and others have work to do
        await send({"type": "http.response.body", "body": b""})

    await cancel_on_disconnect(send_all(), receive)


class ProblemMiddleware:
    """Answers the exceptions of a plain ASGI endpoint as problem documents."""

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
    """Returns the problem to answer with; an unexpected error is logged and its text kept from the client.

    The error loses its traceback: frames in it may refer to the error (through a task that failed with it), and with
    it they would keep their request's body until the garbage collector runs, which it rarely does.
    """
    if isinstance(error, Problem):
        error.__traceback__ = None
        return error
    fields = {"request_id": get_context(scope).id}
    log.error("%s %s failed", scope.get("method", "WS"), route(scope["path"]), exc_info=error, extra={"fields": fields})
    error.__traceback__ = None
    return Problem("internal error: the server's log has the details")


async def send_problem(send: Send, problem: Problem, scope: Scope) -> None:
    """Sends a problem document, as the answer to a request or to a socket's handshake."""
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    body = problem_body(problem, scope)
    headers = [*problem.headers(), (b"content-length", b"%d" % len(body))]
    await send({"type": f"{kind}.start", "status": problem.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
