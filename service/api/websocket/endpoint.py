"""`WS /stream`: many sessions over one socket, in JSON frames or in binary frames of many steps each.

`docs/reference/protocol.md` specifies the frames byte by byte.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from cellserve.service.api.asgi import send_problem
from cellserve.service.api.websocket import json_frames
from cellserve.service.api.websocket.open_socket import OpenSocket, message_content, raw_ref, refuse
from cellserve.service.context import Headers, ServiceContext
from cellserve.service.errors import (
    Problem,
    TooManyWrongKeys,
    Unauthorized,
    UpgradeRequired,
)
from cellserve.service.validation.json_input import decode

_AUTH_SECONDS = 10
_LONGEST_AUTH = 4096  # bytes of the first frame that are read


class StreamEndpoint:
    """The endpoint, plain ASGI; one instance serves all sockets."""

    def __init__(self, service: ServiceContext) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one socket until it is closed."""
        await receive()
        try:
            headers: Headers = [header for header in scope["headers"] if header[0] == b"authorization"]
            has_key = self.service.keys is None or headers != []
            owner = self.service.owner(headers, scope["client"]) if has_key else None
        except Problem as problem:
            await send_problem(send, problem, scope)
            return
        await send({"type": "websocket.accept"})
        if owner is None:
            authenticated = await self._authenticated(scope, receive, send)
            if authenticated is None:
                return
            owner, headers = authenticated
        socket = OpenSocket(self.service, owner, scope, send)
        try:
            async with self.service.while_key_valid(headers, owner) as socket.key:
                await socket.serve(receive)
        except Unauthorized as revoked:
            await socket.refuse(revoked)

    async def _authenticated(self, scope: Scope, receive: Receive, send: Send) -> tuple[str, Headers] | None:
        """Reads the first frame, which must have a key.

        Returns:
            The key's owner, and headers with the key; None if the socket was closed.
        """
        ref: Any = None
        try:
            async with asyncio.timeout(_AUTH_SECONDS):
                message = await receive()
            if message["type"] != "websocket.receive":
                return None
            content, is_text = message_content(message)
            body = content[:_LONGEST_AUTH] if is_text else b""
            ref = raw_ref(json_frames.ref_of(body))
            headers = [json_frames.bearer_header(decode(json_frames.auth_decoder, body).key)]
            owner = self.service.owner(headers, scope["client"])
            await send({"type": "websocket.send", "text": orjson.dumps({"op": "auth", "ref": ref}).decode()})
            return owner, headers
        except (Problem, TimeoutError) as error:
            detail = 'this server needs a key: send {"op": "auth", "key": ...} in the first frame'
            problem = error if isinstance(error, Unauthorized | TooManyWrongKeys) else Unauthorized(detail)
            await refuse(scope, send, ref, problem)
            return None


async def reject_plain_http(scope: Scope, receive: Receive, send: Send) -> None:
    """Raises UpgradeRequired: the endpoint for plain HTTP requests to the socket's path."""
    raise UpgradeRequired(
        "this path is a WebSocket: open ws://HOST:PORT/stream with a WebSocket client (docs/reference/protocol.md)"
    )
