"""One connection of a load: sends prebuilt requests over HTTP/1.1 or a WebSocket, and cuts the answers apart."""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from time import monotonic
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cellserve.benchmark.plan import Body, Client
from cellserve.benchmark.target import reason
from cellserve.benchmark.websocket import BINARY, CLOSE, PING, PONG, TEXT, frame

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked", re.IGNORECASE)
_ERROR_FRAME = b'{"op":"error"'
_LARGEST_STATUS = 1  # of a row in a binary frame: 0 is "applied", 1 "applied before", the rest are HTTP statuses
_OK = range(200, 300)
_SWITCHED = 101  # to a WebSocket


class Load(Protocol):
    """What connections share: the clock, the bodies and the counts."""

    bodies: list[Body]
    sending: bool  # whether a closed loop goes on

    def led(self) -> None:
        """A connection's leads are answered, for the first time."""

    def count(self, since: float, now: float, steps: float) -> None:
        """A request has been answered without an error."""

    def fail(self, since: float, kind: str, sample: str, rows: int = 1) -> None:
        """A request has failed, or so many rows of it."""

    def lead_failed(self, why: str) -> None:
        """A connection could not be led."""

    def lost(self, connection: Connection) -> None:
        """A connection was closed."""


class Connection(asyncio.Protocol):
    """One client of the load.

    Args:
        load: What it shares with the others.
        client: What it sends.
        place: Its number, which decides with which body it begins.
        open_loop: Whether requests are sent when they are due, and not when an answer comes.
    """

    def __init__(self, load: Load, client: Client, place: int, open_loop: bool) -> None:
        self._load, self._client, self._open_loop = load, client, open_loop
        self._next = place
        self._lead = 0  # how many leads are answered
        self._was_led = False
        self.due: deque[float] = deque()  # open loop: when the requests were due that are not sent yet
        self.since = 0.0  # when the request in flight was sent, or due
        self.in_flight = False
        self._steps = 0
        self._transport: asyncio.Transport | None = None
        self._websocket = False
        self._kept = bytearray()  # the beginning of an answer that is not complete
        self._wanted = 0  # its length, once known

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Sends the first lead, if any."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._lead, self._websocket, self._wanted = 0, False, 0
        self._kept.clear()
        self._advance()

    def connection_lost(self, error: Exception | None) -> None:
        """Counts the request in flight as failed."""
        self._transport = None
        if self.in_flight:
            self.in_flight = False
            if self._lead == len(self._client.leads):
                self._load.fail(self.since, "closed", "the server closed the connection before it answered")
        self._load.lost(self)

    def close(self) -> None:
        """Closes the connection, whatever is in flight."""
        self.in_flight = False
        if self._transport is not None:
            self._transport.abort()

    def give(self, due: float) -> None:
        """Open loop: takes a request that is due."""
        self.due.append(due)
        if not self.in_flight:
            self.send()

    def send(self) -> None:
        """Sends the next request, if there is one to send."""
        if self._transport is None or not self._was_led or self._lead < len(self._client.leads):
            return
        if self._open_loop:
            if not self.due:
                return
            self.since = self.due.popleft()
        elif self._load.sending:
            self.since = monotonic()
        else:
            return
        bodies, client = self._load.bodies, self._client
        body, self._steps = bodies[self._next % len(bodies)]
        self._next += 1
        self.in_flight = True
        self._transport.write(client.prefix + body + client.suffix)

    def data_received(self, data: bytes) -> None:
        """Takes the answers that are complete."""
        if self._kept:
            self._kept += data
            if len(self._kept) < self._wanted:
                return
            data = bytes(self._kept)
            self._kept.clear()
        begin = 0
        while begin < len(data):
            self._wanted = 0
            try:
                end = self._read_frame(data, begin) if self._websocket else self._read_http(data, begin)
            except ValueError:
                sample = data[begin : begin + 100].decode(errors="replace")
                self._answered(0, f"the answer is not HTTP/1.1 with a length: {sample!r}")
                return self.close()
            if not end:
                self._kept += data[begin:]
                return
            begin = end

    def _advance(self) -> None:
        """Sends the next lead; after the last one, the first request."""
        if self._lead < len(self._client.leads):
            assert self._transport
            self.in_flight = True
            self._transport.write(self._client.leads[self._lead])
        elif self._was_led:
            self.send()
        else:
            self._was_led = True
            self._load.led()

    def _answered(self, status: int, why: str = "", failed: int = 0, rows: int = 1) -> None:
        """Counts an answer, of which some rows may have failed, and sends what comes next."""
        if not self.in_flight:
            return
        self.in_flight = False
        if self._lead < len(self._client.leads):
            if status not in _OK and status != _SWITCHED:
                return self._load.lead_failed(why)
            self._lead += 1
            return self._advance()
        if status in _OK:
            self._load.count(self.since, monotonic(), self._steps * (rows - failed) / rows)
        else:
            self._load.fail(self.since, str(status) if status else "unreadable", why)
        self.send()

    # Each of these two returns where the answer that begins at `at` ends, or 0 if it is not complete.

    def _read_http(self, data: bytes, at: int) -> int:
        head_end = data.find(b"\r\n\r\n", at)
        if head_end < 0:
            return 0
        status, body = int(data[at + 9 : at + 12]), head_end + 4
        length = _LENGTH.search(data, at, head_end)
        if status in (101, 204):
            end = body
        elif length:
            end = body + int(length[1])
        elif _CHUNKED.search(data, at, head_end):
            end = _end_of_chunks(data, body)
        else:
            raise ValueError
        if not end or end > len(data):
            self._wanted = end - at if end else 0
            return 0
        self._websocket = status == _SWITCHED
        self._answered(status, "" if status in _OK else reason(status, data[body:end]))
        return end

    def _read_frame(self, data: bytes, at: int) -> int:
        """Reads a frame of a WebSocket (RFC 6455, section 5.2); the server does not fragment its messages."""
        if len(data) < at + 2:
            return 0
        size, body = data[at + 1] & 127, at + 2
        if size > 125:
            body += 2 if size == 126 else 8
            if len(data) < body:
                return 0
            size = int.from_bytes(data[at + 2 : body])
        end = body + size
        if end > len(data):
            self._wanted = end - at
            return 0
        opcode = data[at] & 15
        if opcode == CLOSE:
            why = data[body + 2 : end].decode(errors="replace")
            self._answered(0, f"the server closed the WebSocket: {why}")
            self.close()
        elif opcode == PING:
            assert self._transport
            self._transport.write(frame(data[body:end], PONG))
        elif opcode == TEXT:
            self._read_text(data[body:end])
        elif opcode == BINARY:
            self._read_rows(data, body)
        return end

    def _read_text(self, message: bytes) -> None:
        if not message.startswith(_ERROR_FRAME):
            return self._answered(200)
        document = json.loads(message)
        problem = document["problem"]
        status = int(problem["status"])
        why = reason(status, json.dumps(problem).encode())
        if "row" in document:  # the frame's own answer follows
            return self._load.fail(self.since, str(status), why, rows=0)
        self._answered(status, why)

    def _read_rows(self, data: bytes, at: int) -> None:
        """Reads the answer to a binary frame, whose rows have statuses of their own (docs/reference/protocol.md)."""
        rows = int.from_bytes(data[at + 8 : at + 12], "little")
        statuses: NDArray[np.uint32] = np.frombuffer(data, "<u4", rows, at + 16 + 8 * rows)
        failed = statuses[statuses > _LARGEST_STATUS]
        for status in failed.tolist():
            self._load.fail(self.since, str(status), "")
        self._answered(200, failed=len(failed), rows=rows)


def _end_of_chunks(data: bytes, at: int) -> int:
    """Returns where a chunked body (RFC 9112, section 7.1) ends, or 0 if it is not complete."""
    while (line := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line].partition(b";")[0], 16)
        if size == 0:
            end = data.find(b"\r\n\r\n", line)  # after the trailers, of which there are mostly none
            return end + 4 if end >= 0 else 0
        at = line + 2 + size + 2
    return 0
