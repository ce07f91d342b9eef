"""uvicorn's two protocols with a fast path, which need parts of uvicorn that are not public: they are used here alone.

`tests/service/test_uvicorn_protocols.py` names what an upgrade of uvicorn has changed of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from uvicorn import Config
from uvicorn._types import ASGI3Application, ASGISendEvent
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.http11 import Request

from cellserve.service.api.asgi import JSON, RESUMABLE
from cellserve.service.api.client_identity import TrustedProxies
from cellserve.service.api.fast_path import Exchange, FastPath, Headers
from cellserve.service.observability.request_context import HEADER

_LARGEST_BODY = 64 * 1024
FRAMES_EXTENSION = "cellserve.frames"  # ASGI extension: the connection, whose `on_message` the endpoint sets

_log = logging.getLogger("cellserve.sockets")
_log.setLevel(logging.WARNING)  # uvicorn and websockets log a line per socket, which the access log has too


_MORE_TO_IT = frozenset((HEADER, b"content-encoding"))  # headers of requests that are the ASGI endpoint's


def _has_more_to_it(headers: list[tuple[bytes, bytes]]) -> bool:
    for header in headers:  # noqa: SIM110  twice as fast as any(...), for each step over HTTP
        if header[0] in _MORE_TO_IT:
            return True
    return False


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


class FastPathHttp(HttpToolsProtocol):
    """An HTTP/1.1 connection, whose simple requests take the fast path.

    Args:
        config: uvicorn's configuration; its loaded application has a `fast_path`.
        more: Further arguments of uvicorn's protocols.
    """

    def __init__(self, config: Config, *more: Any, **named: Any) -> None:
        super().__init__(config, *more, **named)
        self._fast_path: FastPath = config.loaded_app.fast_path
        self._in_head = False
        self._receiving: Exchange | None = None  # whose body is being received
        self._waiting: Exchange | None = None  # which has not been admitted yet
        self._running: Exchange | RequestResponseCycle | None = None  # the last that was started

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Notes whether the peer is a trusted proxy; then each request says who its client is."""
        super().connection_made(transport)
        self._peer = self.client
        self._is_proxied = self._peer in self._fast_path.proxies

    def shutdown(self) -> None:
        """Closes the connection; aborts a resumable stream whose client reads too slowly."""
        self._fast_path.service.stopping = True
        if self.flow.write_paused and RESUMABLE in getattr(self.cycle, "scope", ()):
            self.transport.abort()
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drops all requests; uvicorn would only do so with the one that was received last."""
        queued = [cycle for cycle, _ in self.pipeline]
        self.pipeline.clear()
        for cycle in (self._running, *queued):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)
        self.cycle = self._running = None  # type: ignore[assignment]  # they refer to this connection

    def on_message_begin(self) -> None:
        """Starts to receive a request; its scope is only built if it falls back to ASGI."""
        if self._waiting is not None:
            self._start(self._waiting)  # what it needs of this connection is overwritten from here on
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Receives a header; a trailer, which comes after the body, is none (RFC 9110, section 6.5.1)."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Chooses between the fast path and ASGI."""
        self._in_head = False
        if self._is_proxied:
            self.client, self.scheme = self._fast_path.proxies.forwarded(self._peer, self.headers)
        parser = self.parser
        route = self._fast_path.route(self.url)
        if (
            route is not None
            and JSON in self.headers
            and (self.cycle is None or self.cycle.response_complete)
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not parser.should_upgrade()
            and not self.expect_100_continue
            and not self._fast_path.service.observes_each_request
            and not _has_more_to_it(self.headers)
        ):
            self._receiving = self._running = Exchange(self, route, self.url, self.headers)
            self.cycle = self._receiving  # type: ignore[assignment]
        else:
            self._fall_back(self.url, self.headers, self.expect_100_continue)

    def on_body(self, body: bytes) -> None:
        """Receives a part of the body."""
        exchange = self._receiving
        if exchange is None:
            super().on_body(body)
            return
        exchange.body += body
        if len(exchange.body) > _LARGEST_BODY:
            self._receiving = self.cycle = None  # type: ignore[assignment]
            self._fall_back(exchange.url, exchange.headers)
            super().on_body(exchange.body)

    def on_message_complete(self) -> None:
        """Starts the request, at once or when it is admitted."""
        exchange = self._receiving
        if exchange is None:
            super().on_message_complete()
            return
        self._receiving = None
        if exchange.route.is_admitted:
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
                self._fall_back(exchange.url, exchange.headers)
                super().on_body(exchange.body)
                super().on_message_complete()
            finally:
                self.parser = parser
        return True

    def _fall_back(self, url: bytes, headers: list[tuple[bytes, bytes]], expects_continue: bool = False) -> None:
        """Replays uvicorn's own handling of a request's head."""
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects_continue
        self.headers += headers  # in place: the scope refers to this list
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

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


class FastPathWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket whose endpoint can handle messages as they arrive and send without awaiting.

    Args:
        config: uvicorn's configuration.
        more: Further arguments of uvicorn's protocols.
    """

    # Called with a message and whether it is text; returns whether it handled the message.
    on_message: Callable[[bytes, bool], bool] | None = None

    def __init__(self, config: Config, *more: Any, **named: Any) -> None:
        super().__init__(config, *more, **named)
        self.logger = self.conn.logger = _log
        self._proxies: TrustedProxies = config.loaded_app.fast_path.proxies

    def handle_connect(self, event: Request) -> None:
        """Accepts the handshake and offers this connection to the endpoint."""
        if self.client in self._proxies:
            headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in event.headers.raw_items()]
            self.client, scheme = self._proxies.forwarded(self.client, headers)
            self.scheme = "wss" if scheme == "https" else "ws"
        super().handle_connect(event)
        if self.handshake_initiated and not self.close_sent:
            self.scope["extensions"][FRAMES_EXTENSION] = self  # type: ignore[assignment]

    async def send(self, message: ASGISendEvent) -> None:
        """Sends a message; notes that a refused handshake is complete, which uvicorn forgets and logs as an error."""
        await super().send(message)
        if self.close_sent:
            self.handshake_complete = True

    def send_receive_event_to_app(self) -> None:
        """Passes a message to `on_message`, or to the ASGI queue if that is not empty or the handler declines."""
        if self.on_message is not None and self.queue.empty() and not self.close_sent:
            message = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
            if self.on_message(bytes(message), self.curr_msg_data_type == "text"):
                self.frames = []
                return
        super().send_receive_event_to_app()

    def send_now(self, data: bytes, text: bool) -> bool:
        """Sends a message at once; returns False if the client reads too slowly or has disconnected."""
        if not self.writable.is_set() or self.close_sent or self.transport.is_closing():
            return False
        try:
            (self.conn.send_text if text else self.conn.send_binary)(data)
        except InvalidState:
            return False
        self.transport.write(b"".join(self.conn.data_to_send()))
        return True
