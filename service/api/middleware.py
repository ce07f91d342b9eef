"""Middleware around the whole application: request ids, counters, and optionally the access log and spans."""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import nullcontext
from time import perf_counter
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from cellserve.service.api.asgi import send_problem
from cellserve.service.api.client_identity import peer_of
from cellserve.service.api.connections.known_heads import KnownHeads
from cellserve.service.api.connections.limits import ConnectionTable
from cellserve.service.api.fast_path import FastPath
from cellserve.service.context import ServiceContext
from cellserve.service.errors import ShuttingDown, Unauthorized
from cellserve.service.observability.request_context import HEADER, KEY, RequestContext, new_id, route
from cellserve.service.sessions.session import peer

_ID = re.compile(rb"[!-~]{1,128}")

log = logging.getLogger("cellserve.access")


class ObservabilityMiddleware:
    """Attaches a context to every request, and records its answer.

    Args:
        app: The application.
        service: Its counters, tracing and settings are used.
        fast_path: Serves what needs no ASGI application; None on the operations port. The server's protocols find it
            here, and the table of the listener's `connections`.
    """

    def __init__(self, app: ASGIApp, service: ServiceContext, fast_path: FastPath | None = None) -> None:
        self.app, self.service, self.fast_path = app, service, fast_path
        self.known_heads = KnownHeads()
        self.connections = ConnectionTable(service.settings, service.counts, is_operations=fast_path is None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        counts = self.service.counts
        peer.set(peer_of(scope))
        context = scope[KEY] = RequestContext(self._id(scope), counts.surface(scope["path"]))
        header = HEADER, context.id.encode()
        is_websocket = scope["type"] == "websocket"

        async def send_with_id(message: Any) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                message["headers"] = [*message.get("headers", ()), header]
                context.status = message.get("status", 101)
            await send(message)

        counts.sockets += is_websocket
        tracing = self.service.tracing
        try:
            with nullcontext() if tracing is None or is_websocket else tracing.request(scope, context):
                await self.app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # uvicorn cancels what has not been answered when a stop has taken long enough, and would answer it 500.
            if context.status or is_websocket:
                raise
            problem = ShuttingDown(
                "the server stopped before this request was answered: send it again, a change with its position"
            )
            await send_problem(send_with_id, problem, scope)
        finally:
            counts.sockets -= is_websocket
            took = perf_counter() - context.started
            if context.status and is_websocket:
                context.surface.statuses[context.status] += 1
            elif context.status:
                context.surface.record_response(context.status, took)
            if self.service.settings.access_log:
                self._log(scope, context, took)

    def _id(self, scope: Scope) -> str:
        for name, value in scope["headers"]:
            if name == HEADER and _ID.fullmatch(value):
                request_id: str = value.decode()
                return request_id
        return new_id()

    def _log(self, scope: Scope, context: RequestContext, took: float) -> None:
        try:
            owner = self.service.known_owner(scope["headers"], scope["client"])
        except Unauthorized:
            owner = ""
        fields = {
            "method": scope.get("method", "WS"),
            "path": route(scope["path"]),
            "status": context.status,
            "duration_ms": round(1000 * took, 3),
            "request_id": context.id,
            "owner": owner,
        }
        log.info("%(method)s %(path)s %(status)s %(duration_ms)s ms", fields, extra={"fields": fields})
