"""The context of a request: its id, its surface's counters, and when it began; kept in its ASGI scope."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from starlette.types import Scope

from cellserve.service.errors import Problem
from cellserve.service.observability.counters import SurfaceCounts

HEADER = b"x-request-id"
KEY = "cellserve.asked"  # of a scope
_PROCESS = secrets.token_hex(8)
_numbers = itertools.count(1)


@dataclass(slots=True)
class RequestContext:
    """One request over HTTP, or one WebSocket."""

    id: str
    surface: SurfaceCounts
    begun: float = field(default_factory=perf_counter)
    status: int = 0  # of the answer, once there is one


def get_context(scope: Scope) -> RequestContext:
    """Gives what there is beside a request, by its scope."""
    asked: RequestContext = scope[KEY]
    return asked


def make_scope(asked: RequestContext, **scope: Any) -> Scope:
    """Makes a scope for what has none of its own."""
    return {**scope, KEY: asked}


def problem_body(problem: Problem, scope: Scope) -> bytes:
    """Counts a problem, and gives its document with the request's id."""
    asked = get_context(scope)
    asked.surface.record_problem(problem)
    return problem.document(asked.id)


def new_id() -> str:
    """Makes a request's id; one is not used twice, and tells nobody how many there are elsewhere."""
    return f"{_PROCESS}-{next(_numbers):x}"


def has_request_id(headers: Iterable[tuple[bytes, bytes]]) -> bool:
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
