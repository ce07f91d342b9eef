"""uvicorn protocols that serve single HTTP steps and `WS /stream` frames without an ASGI task or ASGI messages.

All other requests, and every request with an error in it, go unchanged to the ASGI application.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from time import perf_counter
from typing import Any, ClassVar

import msgspec
import orjson
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.http11 import Request

from cellserve.service.api.asgi import REPLAY, RESUMABLE, as_problem
from cellserve.service.api.step_codec import parse_simple_step, step_json
from cellserve.service.context import ServiceContext
from cellserve.service.errors import Problem
from cellserve.service.observability.request_context import (
    HEADER,
    RequestContext,
    has_request_id,
    make_scope,
    new_id,
    problem_body,
)
from cellserve.service.sessions.pending import PendingStep, StepResult
from cellserve.service.sessions.session import Session

_BEGIN, _END = b"/sessions/", b"/step"
_JSON = (b"content-type", b"application/json")
_LARGEST_BODY = 64 * 1024
FRAMES_EXTENSION = "cellserve.frames"  # ASGI extension: the connection, whose `on_message` the endpoint sets
_SCOPE = {"method": "POST", "path": "/sessions/{id}/step"}  # logged for a failed step

_log = logging.getLogger("cellserve.sockets")
_log.setLevel(logging.WARNING)  # uvicorn and websockets log a line per socket, which the access log has too


class _Step:
    """A step request in progress, with the attributes uvicorn reads of its own request-response cycles."""

    def __init__(self) -> None:
        self.body = b""
        self.response_complete = False
        self.disconnected = False
        self.keep_alive = True
        self.message_event = self
        self.pending: PendingStep | None = None

    def set(self) -> None:
        """Cancels the step if the client has disconnected; uvicorn calls it as an event's `set`."""
        if self.disconnected and self.pending:
            self.pending.cancel()


class FastPathHttp(HttpToolsProtocol):
    """An HTTP/1.1 connection with a fast path for single steps.

    Args:
        config: uvicorn's configuration; its loaded application has a `service`.
        more: Further arguments of uvicorn's protocols.
    """

    # uvicorn's default headers, and the head of a 200 response made of them; shared by all connections.
    _ok_head_cache: ClassVar[tuple[list[tuple[bytes, bytes]], bytes]] = [], b""

    def __init__(self, config: Config, *more: Any, **named: Any) -> None:
        super().__init__(config, *more, **named)
        self._service: ServiceContext = config.loaded_app.service
        self._counts = self._service.counts.surfaces["sessions"]
        self._step: _Step | None = None  # the step whose body is being received

    def shutdown(self) -> None:
        """Closes the connection; aborts a resumable stream whose client reads too slowly."""
        self._service.stopping = True
        if self.flow.write_paused and RESUMABLE in getattr(self.cycle, "scope", ()):
            self.transport.abort()
        super().shutdown()

    def on_message_begin(self) -> None:
        """Starts a request; its scope is only built if it falls back to ASGI."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Chooses between the fast path and ASGI."""
        url, parser = self.url, self.parser
        if (
            url.startswith(_BEGIN)
            and url.endswith(_END)
            and _JSON in self.headers
            and (self.cycle is None or self.cycle.response_complete)
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not parser.should_upgrade()
            and not self.expect_100_continue
            and not self._service.observes_each_request
            and not has_request_id(self.headers)
        ):
            self._step = self.cycle = _Step()  # type: ignore[assignment]
        else:
            self._fall_back_to_asgi()

    def on_body(self, body: bytes) -> None:
        """Appends a part of the body."""
        step = self._step
        if step is None:
            super().on_body(body)
            return
        step.body += body
        if len(step.body) > _LARGEST_BODY:
            self._fall_back_with_body(step)

    def on_message_complete(self) -> None:
        """Submits the step, or falls back to ASGI."""
        step = self._step
        if step is None:
            super().on_message_complete()
            return
        try:
            owner = self._service.owner(self.headers)
            session = self._service.sessions.get(owner, self.url[len(_BEGIN) : -len(_END)].decode())
            x, once = parse_simple_step(session.model, step.body)
            on_done = partial(self._answer, step, session)
            pending = None if x is None else self._service.writer.try_submit(session, x, True, once, on_done)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, Problem):
            pending = None
        if pending is None:
            self._fall_back_with_body(step)
            super().on_message_complete()
            return
        self._step = None
        step.pending = pending

    def _answer(self, step: _Step, session: Session, pending: PendingStep, outcome: StepResult | Exception) -> None:
        if step.disconnected or self.transport.is_closing():
            return
        if isinstance(outcome, Exception):
            self._respond_with_problem(step, outcome)
            return
        answer = step_json(self._service.sessions, session, outcome.y, outcome.position, True, True)
        body = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        head = self._head(200, (_JSON, *REPLAY)) if outcome.replayed else self._ok_head()
        self._respond(step, 200, head, body)

    def _respond_with_problem(self, step: _Step, error: Exception) -> None:
        asked = RequestContext(new_id(), self._counts)
        scope = make_scope(asked, **_SCOPE)
        problem = as_problem(error, scope)
        head = self._head(problem.status, (*problem.headers(), (HEADER, asked.id.encode())))
        self._respond(step, problem.status, head, problem_body(problem, scope))

    def _respond(self, step: _Step, status: int, head: bytes, body: bytes) -> None:
        assert step.pending is not None
        self.transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        self._counts.record_response(status, perf_counter() - step.pending.advance.arrived)
        step.response_complete = True
        if not step.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _head(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        lines = [b"%b: %b\r\n" % header for header in (*self.server_state.default_headers, *headers)]
        return STATUS_LINE[status] + b"".join(lines)

    def _ok_head(self) -> bytes:
        # The default headers contain the date; uvicorn replaces the list every second.
        default, head = self._ok_head_cache
        if default is not self.server_state.default_headers:
            head = self._head(200, (_JSON,))
            FastPathHttp._ok_head_cache = self.server_state.default_headers, head
        return head

    def _fall_back_to_asgi(self) -> None:
        """Replays uvicorn's own handling up to the end of the headers."""
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers += headers  # in place: the scope refers to this list
        super().on_headers_complete()

    def _fall_back_with_body(self, step: _Step) -> None:
        """Falls back to ASGI with the part of the body received so far."""
        self._step = self.cycle = None  # type: ignore[assignment]
        self._fall_back_to_asgi()
        super().on_body(step.body)


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

    def handle_connect(self, event: Request) -> None:
        """Accepts the handshake and offers this connection to the endpoint."""
        super().handle_connect(event)
        if self.handshake_initiated and not self.close_sent:
            self.scope["extensions"][FRAMES_EXTENSION] = self  # type: ignore[assignment]

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
