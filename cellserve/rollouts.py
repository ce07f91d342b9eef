"""What a session gives when it goes on by itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellserve.calls import Call, Pause, Reply, answered, json_request
from cellserve.errors import CellserveError, UnexpectedAnswer, problem_of
from cellserve.events import EVENTS, AsyncEvents, Event, Events, Leave, Listen, Next
from cellserve.layout import Given, listed
from cellserve.numbers import Array, y_of
from cellserve.retry import Tries

if TYPE_CHECKING:
    from cellserve.session import SessionCalls


@dataclass(frozen=True, slots=True)
class Rollout:
    """Outputs of a session that have been its next inputs; the last one has not been taken in yet.

    Attributes:
        y: `[steps, *outputs]` float32, of a model that gives values.
        symbols: `[steps]` integers, of a model that gives symbols.
        labels: Their names, where the model has them.
        text: The names in one, where each is a character.
    """

    y: Array | None
    symbols: Array | None
    labels: tuple[str, ...] | None
    text: str | None


def asked(
    begin: str | Given, steps: int, temperature: float | None, top_k: int | None, seed: int | None
) -> dict[str, Any]:
    """Makes the document that asks for one, without its position."""
    options = {"temperature": temperature, "top_k": top_k, "seed": seed}
    given: dict[str, Any] = {"text": begin} if isinstance(begin, str) else {"x": listed(begin)}
    return {**given, "steps": steps} | {name: value for name, value in options.items() if value is not None}


def read(reply: Reply) -> Rollout:
    """Reads an answer."""
    document = reply.json()
    if "symbols" not in document:
        return Rollout(y_of(reply.content), None, None, None)
    text = document.get("text")
    labels = tuple(text) if text is not None else document.get("labels")
    return Rollout(None, np.array(document["symbols"]), labels and tuple(labels), text)


class Rolled(NamedTuple):
    """One output of a rollout in events, which has been the session's next input unless it is the last.

    Attributes:
        position: Of the session after the step that has given it.
        y: `[*outputs]` float32, of a model that gives values.
        symbol: Of a model that gives symbols.
        label: Its name, where the model has one: a character of the text, say.
    """

    position: int
    y: Array | None
    symbol: int | None
    label: str | None


class Rolling:
    """A rollout in events, without the doing: after a lost connection it is asked for again, from where it was.

    Args:
        session: Which is to go on by itself.
        document: What was asked for, as `asked` makes it.
    """

    def __init__(self, session: SessionCalls, document: dict[str, Any]) -> None:
        self._session = session
        self._document = document
        self._events: Events | AsyncEvents | None = None
        self._reached: int | None = None  # the position of the last event
        self._over = False

    def following(self) -> Call[Rolled | None]:
        """Gives the next output; None after the last one."""
        if self._over:
            return None
        yield from self._session.opened()
        self._document.setdefault("position", self._session.position)  # where it starts, however often it is asked for
        tries = Tries(self._session._retry)
        while True:
            try:
                event = yield from self._next()
                break
            except CellserveError as error:
                yield from self.left()
                wait = tries.pause(error)
            yield Pause(wait)
        told = json.loads(event.data)
        self._reached = self._session._position = told["position"]
        if event.kind == "end":
            self._over = True
            yield from self.left()
            return None
        y = y_of(event.data) if "y" in told else None
        return Rolled(told["position"], y, told.get("symbol"), told.get("text", told.get("label")))

    def left(self) -> Call[None]:
        """Reads no further."""
        if self._events is not None:
            events, self._events = self._events, None
            yield Leave(events)

    def _next(self) -> Call[Event]:
        if self._events is None:
            request = json_request("POST", self._session._path("rollout"), {**self._document, "stream": True})
            since = {} if self._reached is None else {"last-event-id": str(self._reached)}
            told: Reply | Events | AsyncEvents = yield Listen(replace(request, headers={"accept": EVENTS, **since}))
            if isinstance(told, Reply):
                answered(told)
                raise UnexpectedAnswer("the answer is not in events: is this Cellserve's URL?")
            self._events = told
        event: Event = yield Next(self._events)
        if event.kind == "problem":
            raise problem_of(json.loads(event.data))
        return event
