"""Rollouts: a session goes on by itself, what it gives is what it takes next; as one unit, or symbol by symbol."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.errors import PositionConflict
from cellserve.service.idempotency import Request, rollout_request
from cellserve.service.model_repository.repository import Model
from cellserve.service.sessions.sampling import Sampling, draw
from cellserve.service.sessions.session import Session
from cellserve.service.sessions.writer import SessionWriter

Array = NDArray[Any]
States = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Rollout:
    """What is asked of a session: to take x, then what it gives itself, until it has given so many."""

    x: Array  # [time, *features]
    steps: int  # outputs that become inputs; the last one is not taken any more
    sampling: Sampling | None  # None where the output itself is the next input
    streamed: bool

    @property
    def moves(self) -> int:
        """By how many time steps it moves the session."""
        return len(self.x) + self.steps - 1

    def request(self, position: int) -> Request:
        """Makes the request that it is at a position."""
        options = f"{len(self.x)} {self.steps} {self.streamed} {self.sampling and tuple(self.sampling)}"
        return rollout_request(position, self.x, options.encode())


class Given(NamedTuple):
    """One output that has become an input."""

    position: int  # after the step that gave it
    x: Array  # [*features]: a symbol, or the output itself


class RolledOut(NamedTuple):
    """What came of a rollout that is one unit."""

    given: list[Given]
    position: int  # after it
    replayed: bool


class Rollouts:
    """Rolls out sessions.

    Args:
        writer: Changes them.
    """

    def __init__(self, writer: SessionWriter) -> None:
        self._writer = writer
        self._newest: dict[tuple[str, str, bytes], object] = {}  # of the streams of one request, the one that goes on

    async def run(self, session: Session, wanted: Rollout, position: int | None) -> RolledOut:
        """Rolls a session out as one unit, in its turn: all of it is applied at the end, or nothing.

        Args:
            session: The session.
            wanted: What is asked of it.
            position: Where it is to start from; then it is applied once, however often it is sent.

        Raises:
            SessionGone, StepInFlight, PositionConflict, SessionWentBack, NotFinite: As `SessionWriter.submit` does.
            ModelFailed: No symbol can be drawn from an output.
        """
        key = None if position is None else wanted.request(position)

        async def attempt(session: Session) -> RolledOut:
            engine = session.engine
            async with self._writer.locked(session, key) as turn:
                if turn.applied is None:
                    before = engine.arena.read(session.slot)
                    given, states = await _rolled(engine, before, wanted, session.position, wanted.steps)
                    await self._writer.write_state(session, states, key, wanted.moves, before)
                    return RolledOut(given, session.position, False)
            applied = turn.applied
            given, _ = await _rolled(engine, applied.before, wanted, applied.request.position, wanted.steps)
            return RolledOut(given, applied.reached, True)

        return await self._writer.retrying(session, attempt)

    async def stream(
        self, session: Session, wanted: Rollout, position: int | None, after: int | None
    ) -> AsyncGenerator[Given, None]:
        """Rolls a session out symbol by symbol: each is given when the step that gave it is applied, for good.

        Nothing is held between two steps. Another change of the session ends it; so does a newer stream of the same
        request, which goes on in its place.

        Args:
            session: The session.
            wanted: What is asked of it.
            position: Where it is to start from. Where part of this very rollout has been applied already, that is
                computed again from the states before it, and the rest is applied.
            after: Those at positions up to this one are not given, they are known.

        Raises:
            SessionGone, PositionConflict, SessionWentBack, NotFinite: As `SessionWriter.submit` does.
            ModelFailed: No symbol can be drawn from an output.
        """
        mine = object()
        key = None if position is None else _key(session, wanted.request(position))
        if key is not None:
            self._newest[key] = mine
        try:
            request, before, given = await self._begun(session, wanted, position)
            if key is None:
                self._newest[key := _key(session, request)] = mine
            for one in given:
                if after is None or one.position > after:
                    yield one
            last = given[-1]
            end = request.position + wanted.moves
            while last.position < end:
                if self._newest.get(key) is not mine:
                    raise PositionConflict(
                        "Last-Event-ID: the stream was asked for again meanwhile, and goes on there: read that one",
                        position=session.position,
                    )
                session, last = await self._next(session, wanted, request, before, last)
                if after is None or last.position > after:
                    yield last
        finally:
            if key is not None and self._newest.get(key) is mine:
                del self._newest[key]

    async def _begun(
        self, session: Session, wanted: Rollout, position: int | None
    ) -> tuple[Request, States, list[Given]]:
        """Takes x, or finds it taken; gives the request, the states before it, and what it has given so far."""
        asked = None if position is None else wanted.request(position)

        async def attempt(session: Session) -> tuple[Request, States, list[Given]]:
            engine = session.engine
            async with self._writer.locked(session, asked, waits=True) as turn:
                if turn.applied is None:
                    request, before = wanted.request(session.position), engine.arena.read(session.slot)
                    advance = self._writer.enqueue_part(session, turn, wanted.x, request, before)
            if turn.applied is not None:
                assert turn.applied.before is not None
                start = turn.applied.request.position
                steps = turn.applied.reached - start - len(wanted.x) + 1
                given, _ = await _rolled(engine, turn.applied.before, wanted, start, steps)
                return turn.applied.request, turn.applied.before, given
            y = (await advance.awaited)[0, -1]
            return request, before, [_given(session.model, wanted, y, request.position + len(wanted.x))]

        return await self._writer.retrying(session, attempt)

    async def _next(
        self, session: Session, wanted: Rollout, request: Request, before: States, last: Given
    ) -> tuple[Session, Given]:
        """Takes what was given last; gives the session, as it is to be found now, and what comes next."""

        async def attempt(session: Session) -> tuple[Session, Given]:
            async with self._writer.locked(session, Request(last.position, b""), waits=True) as turn:
                if session.applied is None or session.applied.request != request:
                    raise PositionConflict(
                        "position: the session has another history than the rollout: start from where it is",
                        position=session.position,
                    )
                advance = self._writer.enqueue_part(session, turn, last.x[None], request, before)
            y = (await advance.awaited)[0, -1]
            return session, _given(session.model, wanted, y, last.position + 1)

        return await self._writer.retrying(session, attempt)


async def _rolled(
    engine: Engine, before: States | None, wanted: Rollout, start: int, steps: int
) -> tuple[list[Given], States]:
    """Rolls a copy of states out, so many steps of what is asked; gives what it gave, and the states then."""
    with engine.scratch([before]) as slots:
        x, position, given = wanted.x, start, list[Given]()
        while len(given) < steps:
            y = (await engine.submit(slots, x[None], False).awaited)[0, -1]
            position += len(x)
            given.append(_given(engine.model, wanted, y, position))
            x = given[-1].x[None]
        return given, engine.arena.read(int(slots[0]))


def _given(model: Model, wanted: Rollout, y: Array, position: int) -> Given:
    """Makes the next input of an output."""
    if wanted.sampling is None:
        return Given(position, y.copy())
    spec = model.runtime.signature.inputs[0]
    assert spec.bounds is not None
    place = draw(y, model.document.rollout == "logits", wanted.sampling, position)
    return Given(position, np.array(spec.bounds[0] + place, spec.dtype))


def _key(session: Session, request: Request) -> tuple[str, str, bytes]:
    return session.owner, session.id, request.digest
