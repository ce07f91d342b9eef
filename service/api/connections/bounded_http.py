"""uvicorn's HTTP/1.1 protocol within bounds: of heads, pipelining, time, and each client's share of the event loop."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Any

import httptools
from uvicorn import Config
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from cellserve.service.api.connections.http_head import (
    Headers,
    asks_for_websocket,
    check_head,
    path_of,
    target_too_long,
    without_upgrade,
)
from cellserve.service.api.connections.limits import (
    MAX_HEAD_BYTES,
    MAX_TARGET_BYTES,
    TASK_SECONDS,
    TURN_SECONDS,
    Client,
    ConnectionTable,
    Phase,
    Place,
    Progress,
    reset,
)
from cellserve.service.api.fast_path import Exchange
from cellserve.service.errors import HeadTooLarge, MalformedRequest, Problem, RequestTimeout, TooManyConnections
from cellserve.service.observability.counters import Counts
from cellserve.service.observability.request_context import HEADER, new_id

_END = b"\r\n\r\n"  # of a head, and of a chunked body
_AT_ONCE = 8192  # bytes that are parsed at once, if there is no more than one head's end in them
_CHUNKED_PIECE = 4096  # bytes of a chunked body that are parsed at once: a chunk may be a byte
_MOST_DISCARDED = 1024 * 1024  # bytes that a refused client may still send while it should read the refusal
_HEALTH = (b"/healthz", b"/readyz")


class _Flow(FlowControl):
    """uvicorn's flow control; what it lets through again is first what the connection has received and not parsed."""

    def __init__(self, transport: asyncio.Transport, connection: BoundedHttp) -> None:
        super().__init__(transport)
        self.connection: BoundedHttp | None = connection
        self.resumed = 0  # how often the client has read what waited for it

    def resume_reading(self) -> None:
        """Reads again."""
        if self.read_paused:
            self.read_paused = False
            self._go_on()

    def pause_writing(self) -> None:
        """Reads no further requests of a client that does not read their answers."""
        super().pause_writing()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Writes and reads again."""
        super().resume_writing()
        self.resumed += 1
        self._go_on()

    def _go_on(self) -> None:
        if self.connection is not None:
            self.connection.read_on()


class BoundedHttp(HttpToolsProtocol):
    """An HTTP/1.1 connection within bounds.

    Args:
        config: uvicorn's configuration; its loaded application has a table `connections`.
        more: Further arguments of uvicorn's protocols.
    """

    sender: Client
    place: Place
    seen: tuple[Progress, float] | None = None
    flow: _Flow

    def __init__(self, config: Config, *more: Any, **named: Any) -> None:
        super().__init__(config, *more, **named)
        self.table: ConnectionTable = config.loaded_app.connections
        self._in_head = self._in_message = False
        self._uncounted = 0  # bytes of a head, or of chunks' framing, since something of it was complete
        self._body_bytes = self._counted_body = 0
        self._held, self._at = b"", 0  # what was received and not parsed, from where on
        self._is_waiting = False  # for its client's next turn
        self._ignores_upgrade = False
        self._refusal: Problem | None = None
        self._is_lingering = False
        self._discarded = 0  # bytes that arrived after a refusal
        self._running: Exchange | RequestResponseCycle | None = None  # the last request that was started

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admits the connection, or refuses it."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self)
        self.table.enter(self, self.client)
        self._peer, self._peer_client = self.client, self.sender
        self._is_special = self.place is not Place.ORDINARY  # looked at for each request
        if self.place is Place.NONE:
            self._refuse(_too_many())
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drops all requests; uvicorn would only do so with the one that was received last."""
        self.table.leave(self, self._peer_client)
        self._held = b""
        self.flow.connection = None
        queued = [cycle for cycle, _ in self.pipeline]
        self.pipeline.clear()
        for cycle in (self._running, *queued):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)
        self.cycle = self._running = None  # type: ignore[assignment]  # they refer to this connection

    def shutdown(self) -> None:
        """Closes the connection, as soon as what is under way on it is done."""
        self.table.stop()
        super().shutdown()

    # What is received: one request at a time, while its client's turn lasts.

    def data_received(self, data: bytes) -> None:
        """Parses what has arrived, or what there is time for."""
        sender = self.sender
        if self._refusal is not None:
            self._discard(len(data))
        elif self._held or not sender.is_in_turn():
            self._hold(data)
        elif len(data) <= _AT_ONCE and data.count(_END) < 2:
            began = perf_counter()
            self._parse(data)
            sender.spent += perf_counter() - began
        else:
            self._held, self._at = data, 0
            self._parse_held()

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > _MOST_DISCARDED:
            self.transport.close() if self._is_lingering else self.transport.pause_reading()

    def _hold(self, data: bytes) -> None:
        self._held, self._at = self._held[self._at :] + data, 0
        self.transport.pause_reading()
        self._wait()

    def _wait(self) -> None:
        if not self._is_waiting:
            self._is_waiting = True
            self.sender.wait(self)

    def read_on(self) -> None:
        """Goes on after a pause, with what was received before it, unless there is another reason to wait."""
        if not self._may_read():
            return
        if self._held:
            self._wait()
        elif not self.transport.is_closing():
            self.transport.resume_reading()

    def _may_read(self) -> bool:
        return not (self.pipeline or self.flow.read_paused or self.flow.write_paused)

    def go_on(self) -> None:
        """Starts what was parsed, or parses what was received, in its client's turn."""
        self._is_waiting = False
        if self.pipeline and (self._running is None or self._running.response_complete):
            self._start_next()
        else:
            self._parse_held()

    def _parse_held(self) -> None:
        """Parses what is held: until the client's turn is over, or a request waits for the one before it."""
        sender = self.sender
        while self._at < len(self._held):
            if self._refusal is not None or self.transport.is_closing():
                break
            if not self._may_read():
                self.transport.pause_reading()
                return
            if sender.spent >= TURN_SECONDS:
                self.transport.pause_reading()
                self._wait()
                return
            began = perf_counter()
            end = self._end_of_piece()
            piece, self._at = self._held[self._at : end], end  # possibly behind what there is
            self._parse(piece)
            sender = self.sender
            sender.spent += perf_counter() - began
        self._held, self._at = b"", 0
        self.read_on()

    def _end_of_piece(self) -> int:
        """Returns where what is to be parsed next ends: never behind the end of a request."""
        held, start = self._held, self._at
        if self._in_head or not self._in_message:
            most = MAX_HEAD_BYTES + 1 - (self._uncounted if self._in_head else 0)
        else:
            for name, value in self.headers:
                if name == b"content-length":
                    return start + max(int(value) - self._body_bytes, 1)
            most = _CHUNKED_PIECE
        end = held.find(_END, start, start + most)
        return start + most if end < 0 else end + len(_END)

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._ignores_upgrade:
                self._parse_again(data[upgrade.args[0] :])
            else:
                self.handle_websocket_upgrade()
            return
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, Problem) else MalformedRequest(f"this is not HTTP/1.1: {error}"))
            return
        if self._in_message:
            self._count(len(data))

    def _count(self, size: int) -> None:
        """Refuses a head, a chunk's framing or trailers that go on without end."""
        if self._body_bytes != self._counted_body and not self._in_head:
            self._counted_body, self._uncounted = self._body_bytes, 0
        else:
            self._uncounted += size
        if self._uncounted > MAX_HEAD_BYTES:
            long_target = self._in_head and len(self.url) > MAX_TARGET_BYTES
            large = HeadTooLarge(
                f"the request's headers, or trailers, have more than {MAX_HEAD_BYTES} bytes: send less"
            )
            self._refuse(target_too_long() if long_target else large)

    def _parse_again(self, body: bytes) -> None:
        """Parses a request anew whose upgrade is ignored (RFC 9110, section 7.8); the parser has not taken its body."""
        old = self.parser
        head = without_upgrade(old.get_method(), self.url, old.get_http_version(), self.headers)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._parse(head + body)

    # Parser callbacks

    def on_message_begin(self) -> None:
        """Starts to receive a request; its scope is built when its head is complete."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = self._ignores_upgrade = False
        self._in_head = self._in_message = True
        self._body_bytes = self._uncounted = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Receives a header; a trailer, which comes after the body, is none (RFC 9110, section 6.5.1)."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Starts the request, if its head is what it must be."""
        parser = self.parser
        check_head(parser.get_http_version(), self.url, self.headers)
        if self.place is Place.SPARE and (parser.get_method() not in (b"GET", b"HEAD") or self.url not in _HEALTH):
            raise _too_many()
        if parser.should_upgrade() and not self._should_upgrade():
            if parser.get_method() == b"CONNECT":
                raise MalformedRequest("CONNECT: this server is not a proxy")
            self._ignores_upgrade = True
        else:
            self._begin_asgi(self.url, self.headers, self.expect_100_continue)
            if self.place is Place.SPARE:
                self.cycle.keep_alive = False
        self._in_head = False

    def _should_upgrade(self) -> bool:
        version = self.parser.get_http_version()
        method = self.parser.get_method()
        return self._should_upgrade_to_ws() and asks_for_websocket(method, version, self.headers)

    def _begin_asgi(self, url: bytes, headers: Headers, expects_continue: bool = False) -> None:
        """Replays uvicorn's own handling of a request's head."""
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects_continue
        self.headers += headers  # in place: the scope refers to this list
        super().on_headers_complete()
        if b"%2" in url and self.scope.get("path"):  # not for a WebSocket
            self.scope["path"] = path_of(self.scope["raw_path"])

    def on_body(self, body: bytes) -> None:
        """Receives a part of the body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def _replay_body(self, body: bytes) -> None:
        """Passes on what was received of a body, and counted, before its request was ASGI's."""
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Ends the request's body."""
        self._in_message = False
        if not self._ignores_upgrade:
            super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        """Hands the connection over to uvicorn's WebSocket protocol."""
        self.table.leave(self, self._peer_client)
        self.flow.connection = None
        self._held, self._at = b"", 0
        super().handle_websocket_upgrade()
        # They refer to this connection, which nobody else needs any more.
        self.parser = self.cycle = self._running = None  # type: ignore[assignment]

    # Answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        sender = self.sender
        sender.spent += TASK_SECONDS

        async def metered(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
            await sender.metered(app(scope, receive, send))

        super()._start_asgi_task(cycle, metered)

    def on_response_complete(self) -> None:
        """Starts the next request. Idle connections are closed by the table; uvicorn would set a timer for each."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline and self.sender.is_in_turn():
            self._start_next()
        elif self.pipeline:
            self._wait()
        elif self._refusal is not None:
            self._answer_refusal()
        else:
            self.flow.resume_reading()

    def _start_next(self) -> None:
        if not self.transport.is_closing():
            self._start_asgi_task(*self.pipeline.pop())
            self.flow.resume_reading()
            self.read_on()

    def _refuse(self, problem: Problem) -> None:
        """Answers what cannot be served, after the answers before it, and closes the connection."""
        self._refusal = problem
        running = self._running
        if self._in_message and not self._in_head and self.cycle is not None and not self.cycle.response_complete:
            # Its head was fine, its body is not.
            self.pipeline = type(self.pipeline)(one for one in self.pipeline if one[0] is not self.cycle)
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle is running and getattr(running, "response_started", False):
                self.transport.close()
                return
            running = None if self.cycle is running else running
        if not self.pipeline and (running is None or running.response_complete):
            self._answer_refusal()

    def _answer_refusal(self) -> None:
        """Writes the refusal, and waits a moment for the client to read it: to close at once could reset it."""
        problem = self._refusal
        if problem is None or self._is_lingering or self.transport.is_closing():
            return
        self._is_lingering = True
        self.transport.write(refusal(problem, self.server_state.default_headers, self.table.counts))
        self.transport.write_eof()

    # Time limits

    def progress(self) -> Progress:
        """Returns how far the connection is."""
        if self._is_lingering:
            return Progress(Phase.LINGERING)
        unsent = self.transport.get_write_buffer_size()
        if unsent:
            return Progress(Phase.ANSWER, None, self.flow.resumed * 64 * 1024 - unsent)
        if self._in_head:
            return Progress(Phase.HEAD, self.headers)
        if self._held or self.flow.read_paused:
            return Progress(Phase.NOTHING)
        if self._in_message:
            return Progress(Phase.BODY, self.headers, self._body_bytes)
        if self._running is not None and not self._running.response_complete:
            return Progress(Phase.NOTHING)
        return Progress(Phase.IDLE if self.headers else Phase.HEAD, self.headers)

    def give_up(self, phase: Phase) -> None:
        """Ends the connection after its time limit."""
        if phase is Phase.ANSWER:
            reset(self.transport)
        elif phase is Phase.LINGERING:
            self.transport.abort()
        elif self._in_message:
            self._refuse(RequestTimeout(f"the request's {phase.value} stopped arriving: send it without a pause"))
        else:
            self.transport.close()


def _too_many() -> TooManyConnections:
    return TooManyConnections("this server, or your address, has as many connections as it may: close some, or wait")


def refusal(problem: Problem, default_headers: Headers, counts: Counts) -> bytes:
    """Counts the refusal of a connection, and returns its answer."""
    request_id = new_id()
    surface = counts.surfaces["operations"]
    surface.record_problem(problem)
    surface.statuses[problem.status] += 1
    body = problem.document(request_id)
    headers = [
        *default_headers,
        *problem.headers(),
        (HEADER, request_id.encode()),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    head = b"".join(b"%b: %b\r\n" % header for header in headers)
    return b"%b%b\r\n%b" % (STATUS_LINE[problem.status], head, body)
