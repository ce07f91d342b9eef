"""A short way for what carries the load, single steps over HTTP and frames of `WS /stream`: no task, no ASGI messages.

They are uvicorn's own protocols otherwise. A request that is not plainly such a step, or that anything is wrong with,
is handed over whole to the ASGI application, which finds out what it is and says it.
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
from cellserve.service.api.sessions import plain_step, written
from cellserve.service.context import Service
from cellserve.service.errors import Problem
from cellserve.service.observability.request_context import HEADER, Asked, asks_id, new_id, noted, told
from cellserve.service.sessions.pending import PendingStep, StepResult
from cellserve.service.sessions.session import Session

_BEGIN, _END = b"/sessions/", b"/step"
_JSON = (b"content-type", b"application/json")
_LARGEST_BODY = 64 * 1024
EXTENSION = "cellserve.frames"  # of ASGI: the connection, which the endpoint may give a `take` to
_SCOPE = {"method": "POST", "path": "/sessions/{id}/step"}  # for the log

_log = logging.getLogger("cellserve.sockets")
_log.setLevel(logging.WARNING)  # uvicorn and websockets have a line for each socket; the access log tells of them


class _Step:
    """A request under way; uvicorn asks of it what it asks of its own cycles of request and response."""

    def __init__(self) -> None:
        self.body = b""
        self.response_complete = False
        self.disconnected = False
        self.keep_alive = True
        self.message_event = self
        self.pending: PendingStep | None = None

    def set(self) -> None:
        """Is called when the client has gone: what has not been computed is dropped."""
        if self.disconnected and self.pending:
            self.pending.cancel()


class ShortHttp(HttpToolsProtocol):
    """One connection of HTTP/1.1.

    Args:
        config: uvicorn's, of a loaded application that has a `service`.
        more: What uvicorn gives to a protocol.
    """

    _good: ClassVar[tuple[list[tuple[bytes, bytes]], bytes]] = [], b""  # the default headers, a good answer's head

    def __init__(self, config: Config, *more: Any, **named: Any) -> None:
        super().__init__(config, *more, **named)
        self._service: Service = config.loaded_app.service
        self._counts = self._service.counts.surfaces["sessions"]
        self._step: _Step | None = None  # whose body is being received

    def shutdown(self) -> None:
        """Lets the connection end; a stream that can be resumed does so at once, its reader may be a slow one."""
        self._service.stopping = True
        if self.flow.write_paused and RESUMABLE in getattr(self.cycle, "scope", ()):
            self.transport.abort()
        super().shutdown()

    def on_message_begin(self) -> None:
        """Begins a request; its scope is made where it is handed over."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Chooses the way."""
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
            and not self._service.watched
            and not asks_id(self.headers)
        ):
            self._step = self.cycle = _Step()  # type: ignore[assignment]
        else:
            self._hand_over()

    def on_body(self, body: bytes) -> None:
        """Takes a part of the body."""
        step = self._step
        if step is None:
            super().on_body(body)
            return
        step.body += body
        if len(step.body) > _LARGEST_BODY:
            self._hand_over_step(step)

    def on_message_complete(self) -> None:
        """Begins the step."""
        step = self._step
        if step is None:
            super().on_message_complete()
            return
        try:
            owner = self._service.owner(self.headers)
            session = self._service.sessions.get(owner, self.url[len(_BEGIN) : -len(_END)].decode())
            x, once = plain_step(session.model, step.body)
            on_done = partial(self._answer, step, session)
            pending = None if x is None else self._service.writer.try_submit(session, x, True, once, on_done)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, Problem):
            pending = None
        if pending is None:
            self._hand_over_step(step)
            super().on_message_complete()
            return
        self._step = None
        step.pending = pending

    def _answer(self, step: _Step, session: Session, pending: PendingStep, outcome: StepResult | Exception) -> None:
        if step.disconnected or self.transport.is_closing():
            return
        if isinstance(outcome, Exception):
            self._tell_problem(step, outcome)
            return
        answer = written(self._service.sessions, session, outcome.y, outcome.position, True, True)
        body = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        head = self._head(200, (_JSON, *REPLAY)) if outcome.replayed else self._good_head()
        self._send(step, 200, head, body)

    def _tell_problem(self, step: _Step, error: Exception) -> None:
        asked = Asked(new_id(), self._counts)
        scope = noted(asked, **_SCOPE)
        problem = as_problem(error, scope)
        head = self._head(problem.status, (*problem.headers(), (HEADER, asked.id.encode())))
        self._send(step, problem.status, head, told(problem, scope))

    def _send(self, step: _Step, status: int, head: bytes, body: bytes) -> None:
        assert step.pending is not None
        self.transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        self._counts.answered(status, perf_counter() - step.pending.advance.arrived)
        step.response_complete = True
        if not step.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _head(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        lines = [b"%b: %b\r\n" % header for header in (*self.server_state.default_headers, *headers)]
        return STATUS_LINE[status] + b"".join(lines)

    def _good_head(self) -> bytes:
        # The default headers, which uvicorn makes anew each second, hold the date.
        default, head = self._good
        if default is not self.server_state.default_headers:
            head = self._head(200, (_JSON,))
            ShortHttp._good = self.server_state.default_headers, head
        return head

    def _hand_over(self) -> None:
        """Goes uvicorn's way from the end of the headers on."""
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers += headers  # the scope has this list
        super().on_headers_complete()

    def _hand_over_step(self, step: _Step) -> None:
        """Goes uvicorn's way with as much of the body as there is."""
        self._step = self.cycle = None  # type: ignore[assignment]
        self._hand_over()
        super().on_body(step.body)


class ShortFrames(WebSocketsSansIOProtocol):
    """One WebSocket. Whoever serves it may take messages as they arrive, and send without waiting.

    Args:
        config: uvicorn's.
        more: What uvicorn gives to a protocol.
    """

    take: Callable[[bytes, bool], bool] | None = None  # is given a message, and whether it is text; says if it took it

    def __init__(self, config: Config, *more: Any, **named: Any) -> None:
        super().__init__(config, *more, **named)
        self.logger = self.conn.logger = _log

    def handle_connect(self, event: Request) -> None:
        """Begins to serve the socket."""
        super().handle_connect(event)
        if self.handshake_initiated and not self.close_sent:
            self.scope["extensions"][EXTENSION] = self  # type: ignore[assignment]

    def send_receive_event_to_app(self) -> None:
        """Gives a message to the application, in the short way where nothing is in the long one."""
        if self.take is not None and self.queue.empty() and not self.close_sent:
            message = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
            if self.take(bytes(message), self.curr_msg_data_type == "text"):
                self.frames = []
                return
        super().send_receive_event_to_app()

    def put(self, data: bytes, text: bool) -> bool:
        """Sends a message at once; does nothing and says so where the client reads too slowly or has gone."""
        if not self.writable.is_set() or self.close_sent or self.transport.is_closing():
            return False
        try:
            (self.conn.send_text if text else self.conn.send_binary)(data)
        except InvalidState:
            return False
        self.transport.write(b"".join(self.conn.data_to_send()))
        return True
