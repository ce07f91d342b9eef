"""Parser for server-sent events, as the server of Cellserve writes them.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from typing import NamedTuple

from cellserve.errors import AnswerTooLarge


class Event(NamedTuple):
    """One event."""

    kind: str
    data: bytes


class EventParser:
    """Cuts a stream of bytes into events.

    Args:
        max_event_bytes: The most bytes that wait for the end of their event.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._bytes = bytearray()
        self._searched = 0  # bytes in which no event ends

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes of the stream; raises AnswerTooLarge."""
        if len(self._bytes) + len(chunk) > self._max_event_bytes:
            raise AnswerTooLarge(self._max_event_bytes)
        self._bytes += chunk

    def next_event(self) -> Event | None:
        """Returns the next event; None if it is not complete yet."""
        end = self._bytes.find(b"\n\n", self._searched)
        if end < 0:
            self._searched = max(len(self._bytes) - 1, 0)
            return None
        block = bytes(self._bytes[:end])
        del self._bytes[: end + 2]
        self._searched = 0
        fields = dict(line.partition(b": ")[::2] for line in block.split(b"\n"))
        return Event(fields.get(b"event", b"message").decode(), fields.get(b"data", b""))
