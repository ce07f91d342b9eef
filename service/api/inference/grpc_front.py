"""What stands before gRPC's C core: HTTP/2's frames pass as they are, until a request's header fields are too many.

gRPC (1.85) keeps every field that a client sends, whatever `grpc.max_metadata_size` says, and turns all of them into
Python objects in the event loop: a megabyte of CONTINUATION frames takes 150 MB of memory and a good 100 ms from
everyone. Its address is one of Linux's abstract Unix sockets; elsewhere gRPC listens by itself.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import struct
from time import perf_counter

from cellserve.service.api.connections.limits import (
    MAX_HEADERS,
    TURN_SECONDS,
    Client,
    ConnectionTable,
    Phase,
    Place,
    Progress,
    reset,
)
from cellserve.service.api.inference.hpack import count_fields

_FRAMES = 1000  # that are read at once: in half a millisecond
_FRAMES_OF_HEADERS = 50  # as many as take as long as header fields do
MAX_BLOCK_BYTES = 16 * 1024  # of a request's header fields as they are sent, with the heads of their frames
_PREFACE = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")  # RFC 9113, section 3.4
_HEAD = 9  # bytes of a frame's head (section 4.1): length (3), type, flags, stream (4)
_HEADERS, _GOAWAY, _CONTINUATION = 1, 7, 9  # types of frames (section 6)
_END_HEADERS, _PADDED, _PRIORITY = 4, 8, 32  # flags of HEADERS (section 6.2)
_ENHANCE_YOUR_CALM = 11  # section 7

log = logging.getLogger("cellserve")


class HeadersTooLarge(Exception):
    """A client's header fields are more than a request may have, or cannot be read."""


class FrameFilter:
    """Reads one connection's frames, and holds header fields back until they are complete and few enough."""

    def __init__(self) -> None:
        self._data, self._at = b"", 0  # what was received, and how much of it has passed
        self._skip = _PREFACE  # bytes of a frame, or of the preface, that are still to come

    def receive(self, data: bytes) -> None:
        """Takes what has arrived."""
        self._data, self._at = self._data[self._at :] + data, 0

    def passed(self) -> bytes:
        """Returns what may pass next, a number of frames; nothing until more arrives. Raises HeadersTooLarge."""
        data, at, size, frames = self._data, self._at + self._skip, len(self._data), _FRAMES
        while frames > 0 and at + _HEAD <= size:
            if data[at + 3] == _HEADERS:
                end = _end_of_headers(data, at)
                if end is None:
                    break
                at, frames = end, frames - _FRAMES_OF_HEADERS
            else:
                at += _HEAD + (data[at] << 16 | data[at + 1] << 8 | data[at + 2])
                frames -= 1
        self._skip = max(at - size, 0)
        start, self._at = self._at, min(at, size)
        return data[start : self._at]


def _end_of_headers(data: bytes, at: int) -> int | None:
    """Returns where a request's header fields end, those of CONTINUATION frames included; None if more is to come."""
    start = at
    fragments: list[bytes] = []
    while at + _HEAD <= len(data):
        length, kind, flags = data[at] << 16 | data[at + 1] << 8 | data[at + 2], data[at + 3], data[at + 4]
        end = at + _HEAD + length
        if end - start > MAX_BLOCK_BYTES:
            raise HeadersTooLarge(f"a request's header fields have more than {MAX_BLOCK_BYTES} bytes")
        if kind != (_CONTINUATION if fragments else _HEADERS):
            raise HeadersTooLarge("a request's header fields are cut off")
        if end > len(data):
            return None
        fragments.append(_fragment(data[at + _HEAD : end], 0 if fragments else flags))
        if flags & _END_HEADERS:
            if count_fields(b"".join(fragments), MAX_HEADERS) > MAX_HEADERS:
                raise HeadersTooLarge(f"a request has more than {MAX_HEADERS} header fields, or they cannot be read")
            return end
        at = end
    if at - start > MAX_BLOCK_BYTES - _HEAD:
        raise HeadersTooLarge(f"a request's header fields have more than {MAX_BLOCK_BYTES} bytes")
    return None


def _fragment(payload: bytes, flags: int) -> bytes:
    """Returns a frame's fields, without what HEADERS has around them."""
    start, end = 0, len(payload)
    if flags & _PADDED and payload:
        start, end = 1, end - payload[0]
    return payload[start + (5 if flags & _PRIORITY else 0) : end]


class GrpcFront:
    """Listens where clients connect, and passes their connections on to gRPC.

    Args:
        table: The limits of the connections.
    """

    def __init__(self, table: ConnectionTable) -> None:
        self.table = table
        self._name = f"cellserve-{secrets.token_hex(16)}"
        self._connected = 0
        self._server: asyncio.Server | None = None

    @property
    def inner(self) -> str:
        """Where gRPC has to listen."""
        return f"unix-abstract:{self._name}"

    async def open(self, host: str, port: int, reuse_port: bool) -> int:
        """Starts to listen, and returns the port."""
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _FromClient(self), host, port, reuse_port=reuse_port
        )
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    def close(self) -> None:
        """Accepts no more connections; gRPC ends those that are open."""
        if self._server is not None:
            self._server.close()

    async def connect(self, client: _FromClient, host: str) -> _FromServer:
        """Connects a client to gRPC, from a socket whose name ends in the client's address, as `grpc_peer` reads it."""
        loop, to_server = asyncio.get_running_loop(), socket.socket(socket.AF_UNIX)
        try:
            self._connected += 1
            to_server.setblocking(False)
            to_server.bind(f"\0{self._name}/{host.partition('%')[0]}:{self._connected}")
            to_server.connect(f"\0{self._name}")  # at once, or not at all where too many wait
            _, protocol = await loop.create_unix_connection(lambda: _FromServer(client), sock=to_server)
        except BaseException:
            to_server.close()
            raise
        return protocol


class _FromClient(asyncio.Protocol):
    """A client's connection, whose bytes are read in the client's turns."""

    sender: Client
    place: Place
    seen: tuple[Progress, float] | None = None
    transport: asyncio.Transport

    def __init__(self, front: GrpcFront) -> None:
        self._front, self._filter = front, FrameFilter()
        self._server: _FromServer | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._has_unread = False
        self._is_paused = False  # gRPC takes no more for now
        self._resumed = 0  # how often the client has read what waited for it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        peer = transport.get_extra_info("peername")
        self._front.table.enter(self, peer)
        self._admitted_as = self.sender
        if self.place in (Place.SPARE, Place.NONE) or peer is None:  # it has gone already
            transport.abort()
            return
        self._connecting = asyncio.get_running_loop().create_task(self._connect(peer[0]))

    async def _connect(self, host: str) -> None:
        try:
            self._server = await self._front.connect(self, host)
        except OSError as error:
            log.warning("a gRPC connection is dropped: %s", error)
            self.transport.abort()
            return
        if self.transport.is_closing():
            self._server.transport.abort()
        else:
            self.go_on()

    def connection_lost(self, error: Exception | None) -> None:
        self._front.table.leave(self, self._admitted_as)
        if self._server is not None:
            self._server.transport.abort()  # gRPC may read no more: it waits to be read itself
        # They refer to each other: a cycle, which would keep what was received until the garbage collector runs.
        self._server = self._connecting = None

    def data_received(self, data: bytes) -> None:
        self._filter.receive(data)
        if self._server is None or self._has_unread:
            self.transport.pause_reading()
        elif self.sender.is_in_turn():
            self.go_on()
        else:
            self._wait()

    def _wait(self) -> None:
        self._has_unread = True
        self.transport.pause_reading()
        self.sender.wait(self)

    def go_on(self) -> None:
        """Passes on what was received, while its client's turn lasts."""
        self._has_unread = False
        server = self._server
        began = perf_counter()
        while server is not None and not self.transport.is_closing():
            try:
                data = self._filter.passed()
            except HeadersTooLarge as error:
                self._refuse(str(error))
                return
            server.send(data)
            now = perf_counter()
            self.sender.spent += now - began
            began = now
            if not data:
                if not self._is_paused:
                    self.transport.resume_reading()
                return
            if self.sender.spent >= TURN_SECONDS:
                self._wait()
                return

    def _refuse(self, reason: str) -> None:
        """Tells the client why (section 6.8), and ends its connection."""
        told = struct.pack("!II", 0, _ENHANCE_YOUR_CALM) + reason.encode()
        self.transport.write(len(told).to_bytes(3, "big") + bytes((_GOAWAY, 0)) + bytes(4) + told)
        self.transport.close()

    def pause_writing(self) -> None:
        """Reads no more of what gRPC sends until the client has read some of it."""
        if self._server is not None:
            self._server.transport.pause_reading()

    def resume_writing(self) -> None:
        self._resumed += 1
        if self._server is not None and not self._server.transport.is_closing():
            self._server.transport.resume_reading()

    def pause_passing(self) -> None:
        """Reads no more of what the client sends until gRPC has taken some of it."""
        self._is_paused = True
        self.transport.pause_reading()

    def resume_passing(self) -> None:
        self._is_paused = False
        if not self._has_unread and not self.transport.is_closing():
            self.transport.resume_reading()

    def progress(self) -> Progress:
        """Returns how far it is: gRPC has time limits of its own, but an answer that is not read stays here."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            return Progress(Phase.NOTHING)
        return Progress(Phase.ANSWER, None, self._resumed * 64 * 1024 - unsent)

    def give_up(self, phase: Phase) -> None:
        """Ends it after its time limit."""
        reset(self.transport)


class _FromServer(asyncio.Protocol):
    """gRPC's end of a client's connection."""

    transport: asyncio.Transport

    def __init__(self, client: _FromClient) -> None:
        self._client = client

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def send(self, data: bytes) -> None:
        """Passes on what the client sends."""
        if data and not self.transport.is_closing():
            self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        if not self._client.transport.is_closing():
            self._client.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._client.transport.close()

    def pause_writing(self) -> None:
        self._client.pause_passing()

    def resume_writing(self) -> None:
        self._client.resume_passing()
