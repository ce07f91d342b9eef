"""uvicorn's WebSocket protocol within bounds: of frames, time, and each client's share of the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from time import perf_counter
from typing import Any

from uvicorn import Config
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.http11 import Request
from websockets.protocol import State
from websockets.streams import StreamReader

from cellserve.service.api.answer_size import LARGE
from cellserve.service.api.client_identity import TrustedProxies
from cellserve.service.api.connections.bounded_http import refusal
from cellserve.service.api.connections.limits import (
    TASK_SECONDS,
    TURN_SECONDS,
    Client,
    ConnectionTable,
    Phase,
    Place,
    Progress,
    reset,
)
from cellserve.service.api.connections.whole_frames import head_of, whole_message
from cellserve.service.errors import MalformedRequest

FRAMES_EXTENSION = "cellserve.frames"  # ASGI extension: the connection, whose `on_message` the endpoint sets

_FRAMES = 16  # that are parsed at once
_POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1

_log = logging.getLogger("cellserve.sockets")
_log.setLevel(logging.WARNING)  # uvicorn and websockets log a line per socket, which the access log has too


class _FrameReader(StreamReader):
    """The parser's input, of which it reads a number of frames at a time."""

    frames = 0
    is_between_frames = False  # whether the parser has read every frame to its end

    def at_eof(self) -> Generator[None, None, bool]:
        """Tells the parser that there is more to read, once it may."""
        while not (self.buffer and self.frames):
            if self.eof and not self.buffer:
                return True
            self.is_between_frames = True
            yield
        self.is_between_frames = False
        self.frames -= 1
        return False


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket whose endpoint can handle messages as they arrive and send without awaiting.

    Args:
        config: uvicorn's configuration.
        more: Further arguments of uvicorn's protocols.
    """

    # Called with a message and whether it is text; returns whether it handled the message.
    on_message: Callable[[bytes, bool], bool] | None = None
    sender: Client
    place: Place
    seen: tuple[Progress, float] | None = None

    def __init__(self, config: Config, *more: Any, **named: Any) -> None:
        super().__init__(config, *more, **named)
        self.logger = self.conn.logger = _log
        self._proxies: TrustedProxies = config.loaded_app.fast_path.proxies
        self._table: ConnectionTable = config.loaded_app.connections
        self._reader = self.conn.reader = _FrameReader()
        self.conn.parser = self.conn.parse()  # anew: the first one has started to read from another reader
        next(self.conn.parser)
        self._largest: int = config.ws_max_size
        self._has_more = False  # received, and not parsed
        self._is_waiting = False  # for its client's next turn
        self._resumed = 0  # how often the client has read what waited for it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes the connection over from HTTP."""
        super().connection_made(transport)
        self._table.enter(self, self.client)
        self._peer_client = self.sender

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells the endpoint that the client has gone."""
        self._has_more = False
        self._table.leave(self, self._peer_client)
        super().connection_lost(exc)
        # They refer to what refers to them: a cycle, which only the garbage collector frees.
        self.conn.parser.close()
        if hasattr(self, "scope"):  # a handshake that was refused has none
            self.scope["extensions"].pop(FRAMES_EXTENSION, None)

    def shutdown(self) -> None:
        """Closes the socket."""
        self._table.stop()
        super().shutdown()

    def handle_connect(self, event: Request) -> None:
        """Accepts the handshake and offers this connection to the endpoint."""
        if self.client in self._proxies:
            headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in event.headers.raw_items()]
            self.client, scheme = self._proxies.forwarded(self.client, headers)
            self.scheme = "wss" if scheme == "https" else "ws"
            self.sender = self._table.client(self.client)
        super().handle_connect(event)
        if self.handshake_initiated and not self.close_sent:
            self.scope["extensions"][FRAMES_EXTENSION] = self  # type: ignore[assignment]

    async def send(self, message: ASGISendEvent) -> None:
        """Sends a message; notes that a refused handshake is complete, which uvicorn forgets and logs as an error."""
        await super().send(message)
        if self.close_sent:
            self.handshake_complete = True

    # What is received: some frames at a time, while its client's turn lasts and the endpoint takes them.

    def data_received(self, data: bytes) -> None:
        """Parses what has arrived, or what there is time for."""
        if self._has_more or not self.sender.is_in_turn():
            self._reader.buffer += data
            self._has_more = True
            self.transport.pause_reading()
            self._wait()
            return
        self._parse(data)
        if self._has_more:
            self.go_on()

    def _parse(self, data: bytes = b"") -> None:
        began = perf_counter()
        if self._take_alone(data):
            self.sender.spent += perf_counter() - began
            return
        reader = self._reader
        reader.frames = _FRAMES
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self._refuse_handshake(self.conn.handshake_exc)
        elif self.conn.writes:
            self.transport.write(b"".join(self.conn.data_to_send()))
        self._has_more = not reader.frames and bool(reader.buffer)
        self.sender.spent += perf_counter() - began

    def _take_alone(self, data: bytes) -> bool:
        """Passes on these bytes if they are one whole message, as nearly all are: the parser takes 20 µs longer."""
        conn = self.conn
        is_idle = self._reader.is_between_frames and not self._reader.buffer and conn.current_size is None
        message = whole_message(data, self._largest) if is_idle and conn.state is State.OPEN else None
        if message is None:
            return False
        content, is_text = message
        self.frames, self.curr_msg_data_type = [content], "text" if is_text else "bytes"
        self.send_receive_event_to_app()
        return True

    def _wait(self) -> None:
        if not self._is_waiting:
            self._is_waiting = True
            self.sender.wait(self)

    def go_on(self) -> None:
        """Parses what was received, in its client's turn."""
        self._is_waiting = False
        while self._has_more and not self.transport.is_closing():
            if self.read_paused or not self.writable.is_set():
                self.transport.pause_reading()
                return
            if self.sender.spent >= TURN_SECONDS:
                self.transport.pause_reading()
                self._wait()
                return
            self._parse()
        if not self.read_paused and self.writable.is_set():
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        """Reads no further frames of a client that does not read what they are answered with: pongs, for one."""
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """Writes and reads again."""
        super().resume_writing()
        self._resumed += 1
        if not self.read_paused and not self.transport.is_closing():
            self._read_on()

    async def receive(self) -> Any:
        """Returns the endpoint's next message; the frames behind it wait for their turn."""
        message = await super().receive()
        if not self.read_paused and (self._has_more or not self.writable.is_set()):
            self.transport.pause_reading()
            if self.writable.is_set():
                self._read_on()
        return message

    def _read_on(self) -> None:
        if self._has_more:
            self._wait()
        else:
            self.transport.resume_reading()

    def handle_ping(self) -> None:
        """Leaves the pong to be written with those of the other frames."""

    def handle_cont(self, event: Frame) -> None:
        """Adds a fragment to its message, at a cost that does not depend on their number."""
        frames: list[Any] = self.frames
        if not isinstance(frames[0], bytearray):
            frames[0] = bytearray(frames[0])
        message = frames[0]
        message += event.data
        if event.fin:
            self.frames = [bytes(message)]
            self.send_receive_event_to_app()

    def send_receive_event_to_app(self) -> None:
        """Passes a message to `on_message`, or to the ASGI queue if that is not empty or the handler declines.

        In the queue, text is bytes with `is_text`: the endpoint checks it as UTF-8, long text bit by bit.
        """
        [message], self.frames, is_text = self.frames, [], self.curr_msg_data_type == "text"
        if self.close_sent:
            return
        if self.on_message is not None and self.queue.empty() and self.on_message(bytes(message), is_text):
            return
        self.sender.spent += TASK_SECONDS
        self.queue.put_nowait({"type": "websocket.receive", "bytes": bytes(message), "is_text": is_text})  # type: ignore[arg-type]
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    def send_now(self, data: bytes, text: bool) -> bool:
        """Sends a message at once; returns False if the client reads too slowly or has disconnected."""
        if not self.writable.is_set() or self.close_sent or self.transport.is_closing():
            return False
        if self.conn.state is not State.OPEN:
            return False
        head = b"".join((*self.conn.data_to_send(), head_of(len(data), text)))
        if len(data) > LARGE:  # to copy it may take milliseconds
            self.transport.write(head)
            self.transport.write(data)
        else:
            self.transport.write(head + data)
        return True

    def _refuse_handshake(self, error: Exception) -> None:
        """Answers a handshake that cannot be read; uvicorn would leave it open without an answer."""
        self.conn.data_to_send()
        self.handshake_complete = self.close_sent = True
        problem = MalformedRequest(f"the WebSocket's handshake is malformed: {error.__cause__ or error}"[:200])
        self.transport.write(refusal(problem, self.default_headers, self._table.counts))
        self.transport.close()

    # Time limits. A client that answers no ping is uvicorn's to notice.

    def progress(self) -> Progress:
        """Returns how far the socket is."""
        unsent = self.transport.get_write_buffer_size()
        if unsent:
            return Progress(Phase.ANSWER, None, self._resumed * 64 * 1024 - unsent)
        if not self.handshake_complete:
            return Progress(Phase.HEAD)
        if self.conn.current_size is None or self._has_more or self.read_paused:
            return Progress(Phase.NOTHING)
        return Progress(Phase.BODY, self.frames, self.conn.current_size)

    def give_up(self, phase: Phase) -> None:
        """Ends the socket after its time limit."""
        if phase is Phase.BODY and not self.close_sent:
            self.conn.fail(_POLICY_VIOLATION, "the message stopped arriving")
            self.handle_parser_exception()
        else:
            reset(self.transport)
