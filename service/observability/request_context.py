"""The context of a request, kept in its ASGI scope: its id, its surface's counters, its start and status."""

from __future__ import annotations

import itertools
import secrets
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from starlette.types import Scope

from cellserve.service.errors import Problem
from cellserve.service.observability.counters import SurfaceCounts

HEADER = b"x-request-id"
KEY = "cellserve.context"  # in a scope
_PROCESS = secrets.token_hex(8)
_numbers = itertools.count(1)


@dataclass(slots=True)
class RequestContext:
    """The context of an HTTP request or a WebSocket."""

    id: str
    surface: SurfaceCounts
    started: float = field(default_factory=perf_counter)
    status: int = 0  # HTTP status of the answer; 0 until it starts


def get_context(scope: Scope) -> RequestContext:
    """Returns a request's context."""
    context: RequestContext = scope[KEY]
    return context


def make_scope(context: RequestContext, **scope: Any) -> Scope:
    """Returns a scope with a context, for a request that has no ASGI scope."""
    return {**scope, KEY: context}


def problem_body(problem: Problem, scope: Scope) -> bytes:
    """Counts a problem, and returns its JSON document with the request's id."""
    context = get_context(scope)
    context.surface.record_problem(problem)
    return problem.document(context.id)


def new_id() -> str:
    """Returns a new unique request id: a random prefix for each process, and a counter."""
    return f"{_PROCESS}-{next(_numbers):x}"


def route(path: str) -> str:
    """Returns a path for logs and spans: on one line, `{id}` in place of a session's id."""
    parts = path.split("/", 3)
    if len(parts) > 2 and parts[1] == "sessions":
        parts[2] = "{id}"
    return "/".join(parts)[:200].encode("unicode_escape").decode()
