# Generated from _async/event_stream.py by scripts/unasync.py: edit that file.
"""A response in server-sent events, read as it arrives."""

from __future__ import annotations

from collections.abc import Iterator

import httpx

from cellserve.errors import ConnectionLost
from cellserve.protocol.events import Event, EventParser


class EventStream:
    """A response in events.

    Args:
        response: A response whose body has not been read.
        max_event_bytes: The largest event that is read.
    """

    def __init__(self, response: httpx.Response, max_event_bytes: int) -> None:
        self._response = response
        self._chunks: Iterator[bytes] = response.iter_bytes()
        self._parser = EventParser(max_event_bytes)

    def read(self) -> Event:
        """Waits for the next event; raises ConnectionLost, AnswerTooLarge."""
        while (event := self._parser.next_event()) is None:
            try:
                chunk = next(self._chunks, None)
            except httpx.TransportError as error:
                raise ConnectionLost(f"{self._response.url}: {str(error) or type(error).__name__}") from error
            if chunk is None:
                raise ConnectionLost("the connection was lost in the middle of a stream of events")
            self._parser.feed(chunk)
        return event

    def close(self) -> None:
        """Stops reading."""
        self._response.close()
