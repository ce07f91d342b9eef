"""Sessions: a position and a state, held by the server under an id, bound to one version of one model."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from service.engine import Engine
from service.errors import ServerFull, SessionGone, UnknownSession
from service.repository import Model

Array = NDArray[Any]

log = logging.getLogger("cellserve")

_SWEEP_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class Session:
    """One session. What changes it holds its `turn`, whose waiters come in the order of their arrival."""

    id: str
    engine: Engine
    slot: int
    used: float  # seconds of the table's clock
    position: int = 0
    turn: asyncio.Lock | None = None  # made when two requests meet; most never do

    @property
    def model(self) -> Model:
        """The version of the model that it began with and stays on."""
        return self.engine.model


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is left of a session that is gone."""

    reason: str
    position: int
    until: float  # seconds of the table's clock


class SessionTable:
    """All sessions of this process.

    Args:
        max_sessions: Live sessions, at most.
        idle_seconds: A session not used for so long expires.
        tombstone_seconds: For how long it is told of a session that it is gone.
        clock: Gives seconds.
    """

    def __init__(
        self,
        max_sessions: int,
        idle_seconds: float,
        tombstone_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_sessions = max_sessions
        self.idle_seconds = idle_seconds
        self._tombstone_seconds = tombstone_seconds
        self._clock = clock
        self._live: OrderedDict[str, Session] = OrderedDict()  # the longest idle first
        self._gone: OrderedDict[str, Tombstone] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        return len(self._live)

    def create(self, engine: Engine, states: dict[str, Array] | None) -> Session:
        """Makes a session at position 0, from zeros or from given states.

        Raises:
            ServerFull: There are as many sessions as may be.
        """
        self.sweep()
        slot = engine.arena.take() if len(self._live) < self.max_sessions else None
        if slot is None:
            raise ServerFull(
                f"there are {len(self._live)} live sessions, as many as may be: delete some, or try again when one has "
                f"been idle for {self.idle_seconds:g} seconds"
            )
        engine.arena.write(slot, states)
        session = Session(secrets.token_hex(16), engine, slot, self._clock())
        self._live[session.id] = session
        return session

    def get(self, session_id: str) -> Session:
        """Gives a live session, and counts as using it.

        Raises:
            UnknownSession: None of that id is known.
            SessionGone: It was deleted or has expired.
        """
        session = self._live.get(session_id)
        now = self._clock()
        if session is None or self._expired(session, now):
            self.sweep()
            raise self._missing(session_id)
        session.used = now
        self._live.move_to_end(session_id)
        return session

    @asynccontextmanager
    async def turn(self, session: Session) -> AsyncIterator[Session]:
        """Waits until the session is this request's alone, after those that came before it.

        Raises:
            SessionGone: It was deleted meanwhile.
        """
        if session.turn is None:
            session.turn = asyncio.Lock()
        async with session.turn:
            if self._live.get(session.id) is not session:
                raise self._missing(session.id)
            try:
                yield session
            finally:
                if self._live.get(session.id) is session:
                    session.used = self._clock()
                    self._live.move_to_end(session.id)

    async def delete(self, session_id: str) -> None:
        """Deletes a session when those before it have had their turn; a repeated call changes nothing.

        Raises:
            UnknownSession: None of that id is known.
            SessionGone: It had gone for another reason.
        """
        tombstone = self._gone.get(session_id)
        if tombstone is None or tombstone.reason != "deleted":
            async with self.turn(self.get(session_id)) as session:
                self._end(session, "deleted")

    def sweep(self) -> None:
        """Ends the sessions that have been idle for too long, and forgets old tombstones."""
        now = self._clock()
        while self._live:
            session = next(iter(self._live.values()))
            if not self._expired(session, now):
                break
            self._end(session, "expired")
        while self._gone and next(iter(self._gone.values())).until <= now:
            self._gone.popitem(last=False)

    async def keep_swept(self) -> None:
        """Sweeps for as long as it runs."""
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self.idle_seconds))
            self.sweep()

    def _expired(self, session: Session, now: float) -> bool:
        busy = session.turn is not None and session.turn.locked()
        return not busy and session.used + self.idle_seconds <= now

    def _end(self, session: Session, reason: str) -> None:
        del self._live[session.id]
        self._gone[session.id] = Tombstone(reason, session.position, self._clock() + self._tombstone_seconds)
        session.engine.arena.give_back(session.slot)

    def _missing(self, session_id: str) -> UnknownSession | SessionGone:
        tombstone = self._gone.get(session_id)
        if tombstone is None:
            return UnknownSession("there is no session of that id: create one with POST /sessions")
        return SessionGone(
            f"the session was {tombstone.reason} at position {tombstone.position}: create another"
            if tombstone.reason == "deleted"
            else f"the session {tombstone.reason} at position {tombstone.position}: create another, use it more often",
            reason=tombstone.reason,
            position=tombstone.position,
        )
