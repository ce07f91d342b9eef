"""The page at `/`: its files, which stand in `service/ui/`, with headers that keep it to this server."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_FOLDER = Path(__file__).parent.parent / "ui"
_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
# All that the page loads and speaks to is on this server, and nothing is inline. `self` covers its WebSocket too.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # browsers ask again with the ETag: after an upgrade no old file is used
}


class PageFile:
    """One file of the page, held in memory.

    Args:
        path: Where it is read from.
    """

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        etag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'
        self._headers = {**_HEADERS, "etag": etag, "content-type": f"{_TYPES[path.suffix]}; charset=utf-8"}
        self._etag = etag

    async def __call__(self, request: Request) -> Response:
        """Returns the file, or 304 where the browser has it."""
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self._etag in known:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)


def page_routes() -> list[BaseRoute]:
    """Returns a route for each file of the page, of which `index.html` is `/`."""
    return [
        Route("/" if path.name == "index.html" else f"/ui/{path.name}", PageFile(path).__call__, methods=["GET"])
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in _TYPES
    ]
