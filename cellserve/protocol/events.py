"""Parser for server-sent events, as the server of Cellserve writes them.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from typing import NamedTuple


class Event(NamedTuple):
    """One event."""

    kind: str
    data: bytes


class EventParser:
    """Cuts a stream of bytes into events."""

    def __init__(self) -> None:
        self._bytes = b""

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes of the stream."""
        self._bytes += chunk

    def next_event(self) -> Event | None:
        """Returns the next event; None if it is not complete yet."""
        block, end, rest = self._bytes.partition(b"\n\n")
        if not end:
            return None
        self._bytes = rest
        fields = dict(line.partition(b": ")[::2] for line in block.split(b"\n"))
        return Event(fields.get(b"event", b"message").decode(), fields.get(b"data", b""))
