# Generated from _async/rollout_stream.py by scripts/unasync.py: edit that file.
"""A rollout in events that is resumed after a lost connection."""

from __future__ import annotations

import json
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from cellserve._sync.concurrency import sleep
from cellserve._sync.event_stream import EventStream
from cellserve._sync.transport import Transport
from cellserve.errors import CellserveError, UnexpectedAnswer, problem_of
from cellserve.protocol.events import Event
from cellserve.protocol.http import EVENT_STREAM, HttpResponse, json_request
from cellserve.protocol.rollout import RolloutOutput, read_output
from cellserve.protocol.session import SessionRecord
from cellserve.retry import Backoff


class RolloutStream:
    """The outputs of a rollout, one by one; get one from `Session.rollout_stream`.

    After a RetriesExhausted, iteration can continue.

    Args:
        transport: Transport of the session.
        session: The session that is stepped.
        document: The request, without a position.
    """

    def __init__(self, transport: Transport, session: SessionRecord, document: dict[str, Any]) -> None:
        self._transport = transport
        self._session = session
        self._document = document
        self._events: EventStream | None = None
        self._last_position: int | None = None  # of the last event
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RolloutOutput:
        with self._transport.locks.hold((self._session,)):
            output = self._next_output()
        if output is None:
            raise StopIteration
        return output

    def close(self) -> None:
        """Closes the stream; the server then stops generating."""
        with self._transport.locks.hold((self._session,)):
            self._abandon()

    def _next_output(self) -> RolloutOutput | None:
        if self._ended:
            return None
        self._transport.open(self._session)
        self._document.setdefault("position", self._session.position)  # every attempt names the same start
        backoff = Backoff(self._transport.retry)
        while True:
            try:
                event = self._next_event()
                break
            except CellserveError as error:
                self._abandon()
                delay = backoff.delay_after(error)
            sleep(delay)
        output = read_output(event)
        self._last_position = self._session.position = output.position
        if event.kind == "end":
            self._ended = True
            self._abandon()
            return None
        return output

    def _next_event(self) -> Event:
        if self._events is None:
            self._events = self._open_events()
        event = self._events.read()
        if event.kind == "problem":
            raise problem_of(json.loads(event.data))
        return event

    def _open_events(self) -> EventStream:
        request = json_request("POST", self._session.path("rollout"), {**self._document, "stream": True})
        resume = {} if self._last_position is None else {"last-event-id": str(self._last_position)}
        events = self._transport.open_events(replace(request, headers={"accept": EVENT_STREAM, **resume}))
        if isinstance(events, HttpResponse):
            events.raise_for_problem()
            raise UnexpectedAnswer("the answer is not in events: is this the URL of Cellserve?")
        return events

    def _abandon(self) -> None:
        if self._events is not None:
            events, self._events = self._events, None
            events.close()
