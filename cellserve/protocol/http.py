"""HTTP requests and responses as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from cellserve.errors import UnexpectedAnswer, problem_of_body
from cellserve.retry import retry_after

SAFETENSORS = "application/x-safetensors"
EVENT_STREAM = "text/event-stream"
_PAGE = 1000  # the most sessions that the server lists at once


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request to send."""

    method: str
    path: str
    content: bytes = b""
    media_type: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A response, read to its end."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> dict[str, Any]:
        """Returns the JSON document; raises UnexpectedAnswer if the content is not JSON."""
        try:
            document: dict[str, Any] = json.loads(self.content)
            return document
        except ValueError:
            raise UnexpectedAnswer(
                f"the answer is not JSON: {self.content[:100]!r}: is this the URL of Cellserve?"
            ) from None

    def raise_for_problem(self) -> HttpResponse:
        """Returns itself if the status is a success, raises a Problem otherwise."""
        if self.status < 300:
            return self
        raise problem_of_body(self.status, self.content, retry_after(self.headers.get("retry-after")))


def json_request(method: str, path: str, document: Any) -> HttpRequest:
    """Returns a request with a JSON body."""
    return HttpRequest(method, path, json.dumps(document).encode(), "application/json")


def path_of(*parts: str) -> str:
    """Joins names to a path, quoting each."""
    return "/" + "/".join(quote(part, safe="") for part in parts)


def list_sessions(after: str | None) -> HttpRequest:
    """Returns the request for the page of sessions after a given one."""
    return HttpRequest("GET", "/sessions", params={"limit": str(_PAGE)} | ({} if after is None else {"after": after}))
