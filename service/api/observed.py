"""What every request has beside its answer: an id, a place in the counts, and where asked for a log line and a span."""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from service.counts import SurfaceCounts
from service.errors import Problem, Unauthorized

if TYPE_CHECKING:
    from service.api.messages import Endpoint, Receive, Scope, Send
    from service.service import Service

HEADER = b"x-request-id"
_KEY = "cellserve.asked"  # of a scope
_ID = re.compile(rb"[!-~]{1,128}")
_PROCESS = secrets.token_hex(8)
_numbers = itertools.count(1)

log = logging.getLogger("cellserve.access")


@dataclass(slots=True)
class Asked:
    """One request over HTTP, or one WebSocket."""

    id: str
    surface: SurfaceCounts
    begun: float = field(default_factory=perf_counter)
    status: int = 0  # of the answer, once there is one


def asked_of(scope: Scope) -> Asked:
    """Gives what there is beside a request, by its scope."""
    asked: Asked = scope[_KEY]
    return asked


def noted(asked: Asked, **scope: Any) -> Scope:
    """Makes a scope for what has none of its own."""
    return {**scope, _KEY: asked}


def told(problem: Problem, scope: Scope) -> bytes:
    """Counts a problem, and gives its document with the request's id."""
    asked = asked_of(scope)
    asked.surface.problem(problem)
    return problem.document(asked.id)


def new_id() -> str:
    """Makes a request's id; one is not used twice, and tells nobody how many there are elsewhere."""
    return f"{_PROCESS}-{next(_numbers):x}"


def asks_id(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Says whether a request brings an id, by its headers with their names in lower case."""
    for header in headers:  # noqa: SIM110  twice as fast as any(...), for each step over HTTP
        if header[0] == HEADER:
            return True
    return False


def route(path: str) -> str:
    """Gives a path as the log has it: without the session's id, on one line."""
    parts = path.split("/", 3)
    if len(parts) > 2 and parts[1] == "sessions":
        parts[2] = "{id}"
    return "/".join(parts)[:200].encode("unicode_escape").decode()


class Observed:
    """Wraps the whole application.

    Args:
        app: The application.
        service: Holds the counts.
    """

    def __init__(self, app: Endpoint, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        counts = self.service.counts
        asked = scope[_KEY] = Asked(self._id(scope), counts.surface(scope["path"]))
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
                asked.surface.answered(asked.status, took)
            if self.service.settings.access_log:
                self._log(scope, asked, took)

    def _id(self, scope: Scope) -> str:
        for name, value in scope["headers"]:
            if name == HEADER and _ID.fullmatch(value):
                given: str = value.decode()
                return given
        return new_id()

    def _log(self, scope: Scope, asked: Asked, took: float) -> None:
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
        log.info("%(method)s %(path)s %(status)s %(duration_ms)s ms", told, extra={"told": told})
