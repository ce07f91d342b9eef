"""Heads of simple requests that were parsed before: clients send the same headers with every request.

Equal bytes have an equal meaning, so that what the parser said of them once need not be found out again.
"""

from __future__ import annotations

import re
from typing import NamedTuple

Headers = list[tuple[bytes, bytes]]

_REQUEST_LINE = re.compile(rb"POST (/sessions/[\w.~-]+/step|/predict(?:\?[\w.~=&-]*)?) HTTP/1\.1\r\n")
_END = b"\r\n\r\n"
_MOST_HEADS, _MOST_BYTES = 1024, 2048


class Known(NamedTuple):
    """A request whose headers are known, and what has arrived of its body."""

    target: bytes
    headers: Headers
    length: int  # of the whole body
    body: bytes


class KnownHeads:
    """What the parser made of the headers of simple requests, by their bytes; the oldest are forgotten."""

    def __init__(self) -> None:
        self._parsed: dict[bytes, tuple[Headers, int]] = {}  # and the length of the body

    def find(self, data: bytes) -> Known | None:
        """Returns the request that these bytes are, or begin; None if the parser must tell."""
        line = _REQUEST_LINE.match(data)
        if line is None:
            return None
        end = data.find(_END, line.end())
        known = self._parsed.get(data[line.end() : end])
        body = data[end + len(_END) :]
        if known is None or len(body) > known[1]:
            return None
        return Known(line[1], known[0].copy(), known[1], body)

    def learn(self, data: bytes, headers: Headers, body: bytes) -> None:
        """Keeps the headers of a request, if these bytes were its head and that much of its body, and nothing else."""
        line = _REQUEST_LINE.match(data)
        if line is None:
            return
        end = data.find(_END, line.end())
        length = dict(headers).get(b"content-length")
        if 0 < end - line.end() <= _MOST_BYTES and data[end + len(_END) :] == body and length is not None:
            if len(self._parsed) == _MOST_HEADS:
                del self._parsed[next(iter(self._parsed))]
            self._parsed[data[line.end() : end]] = headers.copy(), int(length)
