"""A response in server-sent events, read as it arrives."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

from cellserve.errors import ConnectionLost
from cellserve.protocol.events import Event, EventParser


class AsyncEventStream:
    """A response in events.

    Args:
        response: A response whose body has not been read.
        max_event_bytes: The largest event that is read.
    """

    def __init__(self, response: httpx.Response, max_event_bytes: int) -> None:
        self._response = response
        self._chunks: AsyncIterator[bytes] = response.aiter_bytes()
        self._parser = EventParser(max_event_bytes)

    async def read(self) -> Event:
        """Waits for the next event; raises ConnectionLost, AnswerTooLarge."""
        while (event := self._parser.next_event()) is None:
            try:
                chunk = await anext(self._chunks, None)
            except httpx.TransportError as error:
                raise ConnectionLost(f"{self._response.url}: {str(error) or type(error).__name__}") from error
            if chunk is None:
                raise ConnectionLost("the connection was lost in the middle of a stream of events")
            self._parser.feed(chunk)
        return event

    async def close(self) -> None:
        """Stops reading."""
        await self._response.aclose()
