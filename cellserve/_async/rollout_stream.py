"""A rollout in events that is resumed after a lost connection."""

from __future__ import annotations

import json
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from cellserve._async.concurrency import sleep
from cellserve._async.event_stream import AsyncEventStream
from cellserve._async.transport import AsyncTransport
from cellserve.errors import CellserveError, UnexpectedAnswer, problem_of
from cellserve.protocol.events import Event
from cellserve.protocol.http import EVENT_STREAM, HttpResponse, json_request
from cellserve.protocol.rollout import RolloutOutput, read_output
from cellserve.protocol.session import SessionRecord
from cellserve.retry import Backoff


class AsyncRolloutStream:
    """The outputs of a rollout, one by one; get one from `AsyncSession.rollout_stream`.

    After a RetriesExhausted, iteration can continue.

    Args:
        transport: Transport of the session.
        session: The session that is stepped.
        document: The request, without a position.
    """

    def __init__(self, transport: AsyncTransport, session: SessionRecord, document: dict[str, Any]) -> None:
        self._transport = transport
        self._session = session
        self._document = document
        self._events: AsyncEventStream | None = None
        self._last_position: int | None = None  # of the last event
        self._ended = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RolloutOutput:
        async with self._transport.locks.hold((self._session,)):
            output = await self._next_output()
        if output is None:
            raise StopAsyncIteration
        return output

    async def close(self) -> None:
        """Closes the stream; the server then stops generating."""
        async with self._transport.locks.hold((self._session,)):
            await self._abandon()

    async def _next_output(self) -> RolloutOutput | None:
        if self._ended:
            return None
        await self._transport.open(self._session)
        self._document.setdefault("position", self._session.position)  # every attempt names the same start
        backoff = Backoff(self._transport.retry)
        while True:
            try:
                event = await self._next_event()
                break
            except CellserveError as error:
                await self._abandon()
                delay = backoff.delay_after(error)
            await sleep(delay)
        output = read_output(event)
        self._last_position = self._session.position = output.position
        if event.kind == "end":
            self._ended = True
            await self._abandon()
            return None
        return output

    async def _next_event(self) -> Event:
        if self._events is None:
            self._events = await self._open_events()
        event = await self._events.read()
        if event.kind == "problem":
            raise problem_of(json.loads(event.data))
        return event

    async def _open_events(self) -> AsyncEventStream:
        request = json_request("POST", self._session.path("rollout"), {**self._document, "stream": True})
        resume = {} if self._last_position is None else {"last-event-id": str(self._last_position)}
        events = await self._transport.open_events(replace(request, headers={"accept": EVENT_STREAM, **resume}))
        if isinstance(events, HttpResponse):
            events.raise_for_problem()
            raise UnexpectedAnswer("the answer is not in events: is this the URL of Cellserve?")
        return events

    async def _abandon(self) -> None:
        if self._events is not None:
            events, self._events = self._events, None
            await events.close()
