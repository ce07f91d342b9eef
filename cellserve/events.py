"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) as the server writes them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx

from cellserve.calls import Request
from cellserve.errors import ConnectionLost

EVENTS = "text/event-stream"
_CUT = "the connection was lost in the middle of a stream of events"


class Event(NamedTuple):
    """One event."""

    kind: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Listen:
    """A request whose answer is to be events; what came of it is Events, or a Reply that is none."""

    request: Request


@dataclass(frozen=True, slots=True)
class Next:
    """To be waited for; what came of it is an Event."""

    events: Any  # Events of a Client, AsyncEvents of an AsyncClient


@dataclass(frozen=True, slots=True)
class Leave:
    """Events that nobody waits for any more."""

    events: Any  # Events of a Client, AsyncEvents of an AsyncClient


class _Parts:
    """Bytes as they come, cut into events."""

    def __init__(self) -> None:
        self.bytes = b""

    def take(self) -> Event | None:
        block, end, rest = self.bytes.partition(b"\n\n")
        if not end:
            return None
        self.bytes = rest
        fields = dict(line.partition(b": ")[::2] for line in block.split(b"\n"))
        return Event(fields.get(b"event", b"message").decode(), fields.get(b"data", b""))


class Events:
    """An answer in events, for threads."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._chunks: Iterator[bytes] = response.iter_bytes()
        self._parts = _Parts()

    def next(self) -> Event:
        """Waits for the next one; raises ConnectionLost."""
        while (event := self._parts.take()) is None:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise ConnectionLost(_CUT)
            self._parts.bytes += chunk
        return event

    def close(self) -> None:
        """Reads no further."""
        self._response.close()


class AsyncEvents:
    """An answer in events, for asyncio."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._chunks: AsyncIterator[bytes] = response.aiter_bytes()
        self._parts = _Parts()

    async def next(self) -> Event:
        """Waits for the next one; raises ConnectionLost."""
        while (event := self._parts.take()) is None:
            chunk = await anext(self._chunks, None)
            if chunk is None:
                raise ConnectionLost(_CUT)
            self._parts.bytes += chunk
        return event

    async def close(self) -> None:
        """Reads no further."""
        await self._response.aclose()
