"""Sessions: a position and a state, held by the server under an id, bound to one version of one model."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engine import Engine
from service.errors import Problem, ServerFull, SessionGone, UnknownSession
from service.repository import Model
from service.ticks import Advance

Array = NDArray[Any]

log = logging.getLogger("cellserve")

_SWEEP_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class Session:
    """One session. What changes it comes one after the other, in the order of arrival."""

    id: str
    engine: Engine
    slot: int
    used: float  # seconds of the table's clock
    position: int = 0
    alive: bool = True
    last: asyncio.Future[Any] | None = None  # is done when all that came so far is done

    @property
    def busy(self) -> bool:
        """Whether something that changes it is under way or waits."""
        return self.last is not None and not self.last.done()

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

    async def step(self, session: Session, x: Array, every_output: bool) -> tuple[Array, int]:
        """Steps a session when those before it have had their turn.

        Args:
            session: The session.
            x: `[time, *features]`, checked.
            every_output: Whether the outputs of all time steps are wanted, or the last one's.

        Returns:
            `y [time, *outputs]` (time is 1 where the last output is wanted), and the position after it.

        Raises:
            SessionGone: It was deleted meanwhile.
            NotFinite: The outputs or the next state would not be finite.
        """
        own = await self._turn([session]) if session.busy else None
        try:
            if not session.alive:
                raise self._missing(session.id)
            advance, positions = self._submit([session], x[None], every_output)
            y = await advance.done
        finally:
            if own:
                own.set_result(None)
        return y[0], positions[0]

    async def step_many(self, sessions: Sequence[Session], x: Array) -> tuple[Array, list[int], dict[int, Problem]]:
        """Steps different sessions of one model by as many time steps each, when those before have had their turn.

        Args:
            sessions: The sessions.
            x: `[sessions, time, *features]`, checked.

        Returns:
            `y [sessions, time, *outputs]`, the positions after it, and by row why a session has not moved.
        """
        own = await self._turn(sessions) if any(session.busy for session in sessions) else None
        y = np.zeros((*x.shape[:2], *sessions[0].model.output_shape), np.float32)
        positions = [session.position for session in sessions]
        problems: dict[int, Problem] = {}
        under_way: list[tuple[list[int], Advance, list[int]]] = []
        try:
            for start in range(0, len(sessions), sessions[0].engine.max_batch):
                rows = list(range(start, min(start + sessions[0].engine.max_batch, len(sessions))))
                gone = {row: self._missing(sessions[row].id) for row in rows if not sessions[row].alive}
                problems |= gone
                rows = [row for row in rows if row not in gone]
                try:
                    under_way.append((rows, *self._submit([sessions[row] for row in rows], x[rows], True)))
                except Problem as problem:
                    problems |= dict.fromkeys(rows, problem)
            for rows, advance, reached in under_way:
                try:
                    y[rows] = await advance.done
                except Problem as problem:
                    problems |= dict.fromkeys(rows, problem)
                    continue
                problems |= {rows[place]: problem for place, problem in advance.problems.items()}
                for row, position in zip(rows, reached, strict=True):
                    positions[row] = position
        finally:
            if own:
                own.set_result(None)
        return y, positions, problems

    def _submit(self, sessions: Sequence[Session], x: Array, every_output: bool) -> tuple[Advance, list[int]]:
        """Queues a step of sessions whose turn it is; gives the advance, and the positions, filled when it is done."""
        steps = x.shape[1]
        positions: list[int] = []

        def applied(advance: Advance) -> None:
            now = self._clock()
            for row, session in enumerate(sessions):
                if row not in advance.problems:
                    session.position += steps
                if session.alive:
                    session.used = now
                    self._live.move_to_end(session.id)
                positions.append(session.position)

        slots = np.array([session.slot for session in sessions], np.intp)
        advance = sessions[0].engine.submit(slots, x, every_output, applied)
        for session in sessions:
            if not session.busy:
                session.last = advance.done
        return advance, positions

    async def _turn(self, sessions: Iterable[Session]) -> asyncio.Future[None]:
        """Waits for what came before; gives the future that those who come later wait for: its holder ends it.

        All sessions are joined at once, so that who waits always waits for those who came before, never in a circle.
        """
        own: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        before = [session.last for session in sessions if session.last is not None]
        for session in sessions:
            session.last = own
        try:
            await asyncio.wait(before)
        except asyncio.CancelledError:
            own.set_result(None)
            raise
        return own

    @asynccontextmanager
    async def turn(self, session: Session) -> AsyncIterator[Session]:
        """Waits until the session is this request's alone, after those that came before it.

        Raises:
            SessionGone: It was deleted meanwhile.
        """
        own: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if session.busy:
            own = await self._turn([session])
        else:
            session.last = own
        try:
            if not session.alive:
                raise self._missing(session.id)
            yield session
        finally:
            own.set_result(None)

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
        return not session.busy and session.used + self.idle_seconds <= now

    def _end(self, session: Session, reason: str) -> None:
        del self._live[session.id]
        session.alive = False
        self._gone[session.id] = Tombstone(reason, session.position, self._clock() + self._tombstone_seconds)
        session.engine.arena.give_back(np.array([session.slot]))

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
