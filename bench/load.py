"""The load generator: plain non-blocking sockets, one request under way on each, in one thread.

It does as little as can be done between an answer and the next request, so that it is not what is measured.
"""

from __future__ import annotations

import json
import selectors
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_END = b"\r\n\r\n"


@dataclass
class Load:
    """What came of a load: how many answers in how many seconds, and the latencies where they were asked for."""

    answers: int
    seconds: float
    latencies: list[float] = field(default_factory=list)  # seconds

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answers / self.seconds


def request(path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """Writes a POST request."""
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def http_size(data: bytes | bytearray) -> int | None:
    """Gives the size of the answer that begins here, or None where its head is not whole yet."""
    head = data.find(_END)
    if head < 0:
        return None
    if data[9:10] != b"2":
        raise RuntimeError(bytes(data[:500]).decode(errors="replace"))
    place = data.lower().find(b"content-length:", 0, head)
    return head + 4 + int(data[place + 15 : data.find(b"\r", place)])


def frame_size(data: bytes | bytearray) -> int | None:
    """Gives the size of the WebSocket frame (RFC 6455, section 5.2) that begins here, or None."""
    if len(data) < 4:
        return None
    length = data[1] & 127
    if length < 126:
        return 2 + length
    if length == 126:
        return 4 + int(struct.unpack_from(">H", data, 2)[0])
    return 10 + int(struct.unpack_from(">Q", data, 2)[0]) if len(data) >= 10 else None


def frame(payload: bytes, opcode: int) -> bytes:
    """Writes a client's WebSocket frame; its mask is zero, so that it costs nothing here."""
    length = len(payload)
    if length < 126:
        head = bytes((0x80 | opcode, 0x80 | length))
    elif length < 1 << 16:
        head = bytes((0x80 | opcode, 0x80 | 126)) + struct.pack(">H", length)
    else:
        head = bytes((0x80 | opcode, 0x80 | 127)) + struct.pack(">Q", length)
    return head + bytes(4) + payload


class Connection:
    """One blocking connection, for setting up; `drive` then takes over its socket."""

    def __init__(self, port: int, size: Callable[[bytes | bytearray], int | None] = http_size) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.size = size

    def upgrade(self, path: str) -> None:
        """Makes it a WebSocket."""
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        data = b""
        while _END not in data:
            data += self.socket.recv(4096)
        self.size = frame_size

    def ask(self, data: bytes) -> bytes:
        """Sends a request and gives the answer whole."""
        self.socket.sendall(data)
        return self.answer()

    def answer(self) -> bytes:
        """Waits for an answer."""
        data = b""
        while (size := self.size(data)) is None or len(data) < size:
            data += _received(self.socket)
        return data

    def ask_json(self, path: str, body: object) -> dict:
        """Posts a document and gives the one that is answered."""
        return json.loads(self.ask(request(path, json.dumps(body).encode())).partition(_END)[2])


def drive(
    connections: Sequence[Connection],
    requests: Sequence[Sequence[bytes]],
    seconds: float,
    pause: float = 0.0,
    deep: int = 1,
) -> Load:
    """Keeps each connection busy with its requests, over and over, for so many seconds, and closes it.

    Args:
        connections: The connections.
        requests: For each its requests, in order.
        seconds: For how long, after a tenth of it has gone by unmeasured.
        pause: Between an answer and the next request, seconds; the latencies are kept then.
        deep: Requests under way on each connection.
    """
    selector = selectors.EpollSelector() if hasattr(selectors, "EpollSelector") else selectors.DefaultSelector()
    state = []
    for connection, own in zip(connections, requests, strict=True):
        connection.socket.setblocking(False)
        state.append([connection.socket, own, deep % len(own), bytearray(), connection.size, time.perf_counter()])
        selector.register(connection.socket, selectors.EVENT_READ, state[-1])
        for place in range(deep):
            _send(connection.socket, own[place % len(own)])
    begin = time.perf_counter()
    start, end = begin + 0.1 * seconds, begin + 1.1 * seconds
    answers, measured, latencies = 0, 0.0, []
    now = begin
    while now < end:
        for key, _ in selector.select(0.1):
            held = key.data
            sock, own, place, data, size, sent = held
            data += _received(sock)
            while (whole := size(data)) is not None and len(data) >= whole:
                del data[:whole]
                if now >= start:
                    answers += 1
                if pause:
                    if now >= start:
                        latencies.append(time.perf_counter() - sent)
                    time.sleep(pause)
                    held[5] = time.perf_counter()
                _send(sock, own[place])
                place = held[2] = (place + 1) % len(own)
        now = time.perf_counter()
        measured = now - start
    selector.close()
    for connection in connections:
        connection.socket.close()
    return Load(answers, measured, latencies)


def _received(sock: socket.socket) -> bytes:
    part = sock.recv(1 << 20)
    if not part:
        raise RuntimeError("the server closed the connection")
    return part


def _send(sock: socket.socket, data: bytes) -> None:
    sent = sock.send(data)
    if sent < len(data):
        sock.setblocking(True)
        sock.sendall(data[sent:])
        sock.setblocking(False)
