"""uvicorn's HTTP/1.1 protocol, within bounds and with a fast path."""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from cellserve.service.api.asgi import JSON, RESUMABLE
from cellserve.service.api.connections.bounded_http import BoundedHttp
from cellserve.service.api.connections.known_heads import KnownHeads
from cellserve.service.api.connections.limits import MAX_HEADERS, MAX_TARGET_BYTES, Place
from cellserve.service.api.curl_newline import is_curl
from cellserve.service.api.fast_path import Exchange, FastPath, Headers, Route
from cellserve.service.observability.request_context import HEADER

_LARGEST_BODY = 64 * 1024
_MORE_TO_IT = frozenset((HEADER, b"content-encoding", b"transfer-encoding"))  # such requests are the ASGI endpoint's


def _is_simple(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether no header is there twice or needs more than the fast path does."""
    named = dict(headers)
    return (
        len(named) == len(headers) <= MAX_HEADERS
        and b"host" in named
        and _MORE_TO_IT.isdisjoint(named)
        and not is_curl(named.get(b"user-agent", b""))
    )


class _SimplePost:
    """What the parser said of a request on the fast path; when it falls back, the parser may be at the next one."""

    def get_method(self) -> bytes:
        return b"POST"

    def get_http_version(self) -> str:
        return "1.1"

    def should_keep_alive(self) -> bool:
        return True

    def should_upgrade(self) -> bool:
        return False


class FastPathHttp(BoundedHttp):
    """An HTTP/1.1 connection, whose simple requests take the fast path.

    Args:
        config: uvicorn's configuration; its loaded application has a `fast_path`.
        more: Further arguments of uvicorn's protocols.
    """

    def __init__(self, config: Config, *more: Any, **named: Any) -> None:
        super().__init__(config, *more, **named)
        self._fast_path: FastPath = config.loaded_app.fast_path
        self._known_heads: KnownHeads = config.loaded_app.known_heads
        self._largest_body = min(_LARGEST_BODY, self._fast_path.service.settings.max_body_bytes)
        self._receiving: Exchange | None = None  # whose body is being received
        self._parsed: Exchange | None = None  # which the parser has just begun
        self._left = 0  # bytes of a body that the parser will not see
        self._waiting: Exchange | None = None  # which has not been admitted yet

    def shutdown(self) -> None:
        """Closes the connection; aborts a resumable stream whose client reads too slowly."""
        self._fast_path.service.stopping = True
        if self.flow.write_paused and RESUMABLE in getattr(self.cycle, "scope", ()):
            self.transport.abort()
        super().shutdown()

    def _parse(self, data: bytes) -> None:
        if self._left:
            self._receive_known(data)
        elif self._in_message:
            super()._parse(data)
        elif not self._take_known(data):
            super()._parse(data)
            exchange, self._parsed = self._parsed, None
            if exchange is not None:
                self._known_heads.learn(data, exchange.headers, exchange.body)

    def _take_known(self, data: bytes) -> bool:
        """Begins the request that these bytes are without the parser, if it has parsed the same headers before."""
        if not self._is_free():
            return False
        known = self._known_heads.find(data)
        route = None if known is None else self._route(known.target, known.headers)
        if known is None or route is None or known.length > self._largest_body:
            return False
        self.url, self.headers = known.target, known.headers
        self.expect_100_continue = self._ignores_upgrade = False
        self._in_message, self._body_bytes, self._left = True, 0, known.length
        if self._is_special:
            self._find_sender()
        self._begin(route)
        self._receive_known(known.body)
        return True

    def _receive_known(self, data: bytes) -> None:
        """Receives a part of the body of a request whose head the parser has not seen."""
        body, rest = data[: self._left], data[self._left :]
        self._left -= len(body)
        self.on_body(body)
        if not self._left:
            self.on_message_complete()
        if rest:
            self._parse(rest)

    def on_message_begin(self) -> None:
        """Starts to receive a request; its scope is only built if it falls back to ASGI."""
        if self._waiting is not None:
            self._start(self._waiting)  # what it needs of this connection is overwritten from here on
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Chooses between the fast path and ASGI."""
        if self._is_special:
            self._find_sender()
        parser = self.parser
        route = self._route(self.url, self.headers)
        if (
            route is not None
            and self._is_free()
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not parser.should_upgrade()
            and not self.expect_100_continue
            and _is_simple(self.headers)
        ):
            self._in_head = False
            self._parsed = self._begin(route)
        else:
            super().on_headers_complete()

    def _route(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> Route | None:
        return self._fast_path.route(target, headers) if len(target) <= MAX_TARGET_BYTES else None

    def _is_free(self) -> bool:
        """Whether a request may take the fast path now."""
        return (
            (self.cycle is None or self.cycle.response_complete)
            and not self._fast_path.service.observes_each_request
            and self.place is not Place.SPARE
        )

    def _begin(self, route: Route) -> Exchange:
        self._receiving = self._running = exchange = Exchange(self, route, self.url, self.headers)
        self.cycle = exchange  # type: ignore[assignment]
        return exchange

    def _find_sender(self) -> None:
        """Tells apart the clients whose requests a trusted proxy sends over one connection."""
        if self.place is Place.PROXY:
            self.client, self.scheme = self._fast_path.proxies.forwarded(self._peer, self.headers)
            self.sender = self.table.client(self.client)

    def on_body(self, body: bytes) -> None:
        """Receives a part of the body."""
        exchange = self._receiving
        if exchange is None:
            super().on_body(body)
            return
        self._body_bytes += len(body)
        exchange.body += body
        if len(exchange.body) > self._largest_body:
            self._receiving = self.cycle = None  # type: ignore[assignment]
            self._begin_asgi(exchange.url, exchange.headers)
            self._replay_body(exchange.body)

    def on_message_complete(self) -> None:
        """Starts the request, at once or when it is admitted."""
        exchange = self._receiving
        if exchange is None:
            super().on_message_complete()
            return
        self._receiving = None
        self._in_message = False
        if len(exchange.body) > exchange.route.admitted_bytes:
            self._waiting = exchange
            self._fast_path.admit(partial(self._start, exchange))
        else:
            self._start(exchange)

    def _start(self, exchange: Exchange) -> bool:
        """Starts a request, or falls back to ASGI; returns False where that is done or the client has disconnected."""
        if exchange.is_started or exchange.disconnected:
            return False
        exchange.is_started = True
        self._waiting = None
        if not exchange.route.start(exchange):
            self.cycle = None  # type: ignore[assignment]
            parser, self.parser = self.parser, _SimplePost()  # type: ignore[assignment]
            try:
                self._begin_asgi(exchange.url, exchange.headers)
                self._replay_body(exchange.body)
                super().on_message_complete()
            finally:
                self.parser = parser
        return True

    def respond(self, exchange: Exchange, status: int, body: bytes, headers: Headers | None = None) -> None:
        """Sends the answer to a request on the fast path."""
        if exchange.disconnected or self.transport.is_closing():
            return
        assert exchange.pending is not None
        head = self._ok_head() if headers is None else self._head(status, headers)
        self.transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        exchange.route.surface.record_response(status, perf_counter() - exchange.pending.item.enqueued_at)
        exchange.response_complete = True
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _head(self, status: int, headers: Headers) -> bytes:
        lines = [b"%b: %b\r\n" % header for header in (*self.server_state.default_headers, *headers)]
        return STATUS_LINE[status] + b"".join(lines)

    def _ok_head(self) -> bytes:
        # The default headers contain the date; uvicorn replaces the list every second.
        default, head = self._fast_path.ok_head
        if default is not self.server_state.default_headers:
            head = self._head(200, (JSON,))
            self._fast_path.ok_head = self.server_state.default_headers, head
        return head
