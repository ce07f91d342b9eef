"""What every request has beside its answer: an id, a place in the counts, and where asked for a log line and a span."""

from __future__ import annotations

import logging
import re
from contextlib import nullcontext
from time import perf_counter
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from cellserve.service.context import ServiceContext
from cellserve.service.errors import Unauthorized
from cellserve.service.observability.request_context import HEADER, KEY, RequestContext, new_id, route

_ID = re.compile(rb"[!-~]{1,128}")

log = logging.getLogger("cellserve.access")


class ObservabilityMiddleware:
    """Wraps the whole application.

    Args:
        app: The application.
        service: Holds the counts.
    """

    def __init__(self, app: ASGIApp, service: ServiceContext) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        counts = self.service.counts
        asked = scope[KEY] = RequestContext(self._id(scope), counts.surface(scope["path"]))
        header = HEADER, asked.id.encode()
        socket = scope["type"] == "websocket"

        async def answer(message: Any) -> None:
            kind = message["type"]
            if kind in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                message["headers"] = [*message.get("headers", ()), header]
                asked.status = message.get("status", 101)
            await send(message)

        counts.sockets += socket
        tracing = self.service.tracing
        try:
            with nullcontext() if tracing is None or socket else tracing.request(scope, asked):
                await self.app(scope, receive, answer)
        finally:
            counts.sockets -= socket
            took = perf_counter() - asked.begun
            if asked.status and socket:
                asked.surface.statuses[asked.status] += 1
            elif asked.status:
                asked.surface.record_response(asked.status, took)
            if self.service.settings.access_log:
                self._log(scope, asked, took)

    def _id(self, scope: Scope) -> str:
        for name, value in scope["headers"]:
            if name == HEADER and _ID.fullmatch(value):
                given: str = value.decode()
                return given
        return new_id()

    def _log(self, scope: Scope, asked: RequestContext, took: float) -> None:
        try:
            owner = self.service.owner(scope["headers"])
        except Unauthorized:
            owner = ""
        told = {
            "method": scope.get("method", "WS"),
            "path": route(scope["path"]),
            "status": asked.status,
            "duration_ms": round(1000 * took, 3),
            "request_id": asked.id,
            "owner": owner,
        }
        log.info("%(method)s %(path)s %(status)s %(duration_ms)s ms", told, extra={"fields": told})
