"""What pages in a browser may ask for: only of allowed origins, and only by this server's own names.

Everything is refused that a page could send without the browser asking first (CORS): sockets, and requests that change
something. A page whose own name is made to resolve to this server (DNS rebinding) is of the same origin; it is stopped
by its name in `Host`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cellserve.service.api.asgi import send_problem
from cellserve.service.errors import Forbidden, Misdirected, Problem
from cellserve.service.observability.request_context import HEADER

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_METHODS = ("DELETE", "GET", "HEAD", "POST", "PUT")
_EXPOSED = ("Idempotent-Replay", "Inference-Header-Content-Length", "Location", "Retry-After", HEADER.decode())
_PREFLIGHT_SECONDS = 600
_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::[0-9]*)?")  # RFC 9110, section 7.2


class BrowserRules:
    """The origins and host names that are allowed.

    Args:
        hosts: Names in `Host`, comma-separated; none means any.
        origins: Origins other than the server's own, comma-separated.
    """

    def __init__(self, hosts: str, origins: str = "") -> None:
        self.hosts = frozenset(_listed(hosts))
        self.origins = frozenset(_listed(origins))

    def check(self, scope: Scope) -> None:
        """Checks a request or a socket's handshake.

        Raises:
            Misdirected: It names a host that is not allowed.
            Forbidden: A page of a foreign origin opens a socket, or would change something.
        """
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self.allows_host(host):
            raise Misdirected(
                f"{host[:100]!r} is not a name of this server: send one that --allowed-hosts has, or an address"
            )
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if not origin or origin in self.origins or scope.get("method") in _SAFE_METHODS:
            return
        scheme = "https" if scope["scheme"] in ("https", "wss") else "http"
        # Behind a proxy that is not trusted the scheme is unknown, but the browser knows (Fetch Metadata).
        if origin != f"{scheme}://{host}" and headers.get(b"sec-fetch-site") != b"same-origin":
            what = "open sockets" if scope["type"] == "websocket" else "change anything"
            raise Forbidden(
                f"pages of {origin[:100]!r} may not {what} here: the server can allow them with --allowed-origins"
            )

    def allows_host(self, host: str) -> bool:
        """Whether a request may name this host; addresses and localhost, which nobody can rebind, always."""
        if not self.hosts:
            return True
        found = _HOST.fullmatch(host)
        return found is not None and (found[1] in self.hosts or found[1] in ("", "localhost") or _is_address(found[1]))

    def take_fast_path(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a request with these headers needs no further check, and no header in its answer."""
        for name, value in headers:
            if name == b"origin" or (name == b"host" and not self.allows_host(value.decode("latin-1").lower())):
                return False
        return True


class BrowserRulesMiddleware:
    """Refuses what the rules do not allow, and adds CORS headers to what allowed origins get.

    Args:
        app: The application.
        rules: The rules.
    """

    def __init__(self, app: ASGIApp, rules: BrowserRules) -> None:
        self._rules, self._app = rules, app
        if rules.origins:
            self._app = CORSMiddleware(
                app,
                allow_origins=sorted(rules.origins),
                allow_methods=_METHODS,
                allow_headers=["*"],
                expose_headers=_EXPOSED,
                max_age=_PREFLIGHT_SECONDS,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "lifespan":
            try:
                self._rules.check(scope)
            except Problem as problem:
                await send_problem(send, problem, scope)
                return
        await self._app(scope, receive, send)


def _listed(text: str) -> list[str]:
    return [one.strip().lower() for one in text.split(",") if one.strip()]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
