"""Sessions: a position and a state, held by the server under an id, bound to one version of one model."""

from __future__ import annotations

import itertools
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.arena import Slots
from service.engine import Engine
from service.errors import ModelVersionNotHere, Problem, ServerFull, SessionExists, SessionGone, UnknownSession
from service.exactly_once import Applied, Request, check
from service.repository import Model, VersionKey
from service.settings import WhenFull
from service.turns import Turns

Array = NDArray[Any]
Durable = Literal["none", "snapshot", "store"]  # what outlives the process


@dataclass(slots=True, eq=False)
class Session:
    """One session; its position and its state are in the slot. Its changes come one by one, in order of arrival."""

    owner: str  # whose key made it; empty where nobody needs a key
    id: str
    engine: Engine
    slot: int
    slots: Slots  # the slot again, as the engine takes it
    origin: bytes  # digest of the request that made it, where its id was chosen by the client
    alive: bool = True
    claimed: bool = False  # a change with a position is under way
    applied: Applied | None = None  # the last change with a position
    revision: bytes | None = None  # in a shared store, of what is in the slot; without one it must be read again
    indexed: float = -math.inf  # when its deadline was last moved in a shared store, seconds

    @property
    def model(self) -> Model:
        """The version of the model that it began with and stays on."""
        return self.engine.model

    @property
    def position(self) -> int:
        """Counts what has changed it: its steps by their number, all else by one."""
        return int(self.engine.arena.position[self.slot])


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is left of a session that is gone."""

    reason: str
    position: int
    until: float  # seconds of the table's clock


class StoreUnusable(Exception):
    """What was given as the store cannot be one; the message says why."""


class Listed(NamedTuple):
    """What a list of sessions tells of one."""

    id: str
    model: str
    version: int
    position: int


class SessionTable:
    """All sessions of this process, each known by its owner and its id.

    Args:
        max_sessions: Live sessions, at most.
        idle_seconds: A session not used for so long expires.
        tombstone_seconds: For how long it is told of a session that it is gone.
        when_full: Whether one session more is refused, or the one that was idle for the longest time makes room.
        clock: Gives seconds.
    """

    shared = False  # whether other processes have the same sessions

    def __init__(
        self,
        max_sessions: int,
        idle_seconds: float,
        tombstone_seconds: float,
        when_full: WhenFull = "refuse",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_sessions = max_sessions
        self.idle_seconds = idle_seconds
        self._tombstone_seconds = tombstone_seconds
        self.when_full = when_full
        self.clock = clock
        self.durable: Durable = "none"
        self.live: dict[str, Session] = {}
        self.gone: OrderedDict[str, Tombstone] = OrderedDict()  # the oldest first
        self.elsewhere: dict[str, str] = {}  # sessions that wait for a version of a model that is not served here
        self.endings = 0  # of sessions here, so far
        self.created = 0  # so far
        self.ended = dict.fromkeys(("deleted", "expired", "evicted"), 0)  # so far
        self.by_slot: dict[Engine, dict[int, Session]] = {}
        self.turns: dict[Engine, Turns] = {}
        self._numbers: dict[Engine, int] = {}  # in the order of by_slot; none is used twice
        self._engines = itertools.count()
        # Gives the engine of a version by its name and digest, loaded where it has to be; for sessions from elsewhere.
        self.load: Callable[[VersionKey, str], Awaitable[Engine | None]] | None = None

    def __len__(self) -> int:
        return len(self.live)

    async def start(self) -> None:
        """Looks over where the sessions are kept."""

    async def close(self) -> None:
        """Lets go of where they are kept."""

    @property
    def store_errors(self) -> int:
        """How often the store did not answer, so far: there is none."""
        return 0

    async def count(self) -> int:
        """Counts the live sessions, wherever they are."""
        return len(self.live)

    def serve(self, engine: Engine) -> None:
        """Takes charge of an engine's sessions."""
        self.by_slot[engine] = {}
        self.turns[engine] = turns = Turns(engine.arena)
        self._numbers[engine] = next(self._engines)
        engine.settle = partial(self._settle, engine)
        engine.release = turns.leave

    def dismiss(self, engine: Engine) -> None:
        """Lets go of an engine that has no sessions."""
        del self.by_slot[engine], self.turns[engine], self._numbers[engine]
        # The two refer to each other, and of what was there at the start the collector frees nothing (`gc.freeze`).
        del engine.settle, engine.release
        engine.commit = None

    def create(
        self,
        engine: Engine,
        states: dict[str, Array] | None,
        owner: str = "",
        session_id: str | None = None,
        origin: bytes = b"",
        position: int = 0,
    ) -> tuple[Session, bool]:
        """Makes a session from zeros or from given states.

        Args:
            engine: Of the model.
            states: By name; None for zeros.
            owner: Whose it is.
            session_id: Where the client chooses it; then the call may be repeated.
            origin: Digest of the request, where the client chooses the id.
            position: To begin at.

        Returns:
            The session, and whether it was made by this call.

        Raises:
            SessionExists: There is one of that id, which another request has made.
            SessionGone: There was one of that id.
            ServerFull: There are as many sessions as may be.
        """
        if session_id is not None:
            known = self.live.get(key_of(owner, session_id))
            if known is not None:
                if known.origin != origin:
                    raise SessionExists(
                        f"there is a session {session_id!r} already, which another request has made (of model "
                        f"{known.model.name!r}): choose another id, or repeat that request",
                        position=known.position,
                    )
                self.touch(known)
                return known, False
            if key_of(owner, session_id) in self.gone or key_of(owner, session_id) in self.elsewhere:
                raise self.missing(owner, session_id)
        return self._made(engine, states, owner, session_id or self.new_id(), origin, position), True

    def _made(
        self,
        engine: Engine,
        states: dict[str, Array] | None,
        owner: str,
        session_id: str,
        origin: bytes,
        position: int = 0,
    ) -> Session:
        slot = self._room(engine)
        arena = engine.arena
        if states is not None:
            arena.write(slot, states)
        arena.position[slot], arena.used[slot] = position, self.clock()
        self.created += 1
        return self.add(Session(owner, session_id, engine, slot, np.array((slot,)), origin))

    def add(self, session: Session) -> Session:
        """Counts a session whose slot has been filled among the live ones."""
        self.live[key_of(session.owner, session.id)] = self.by_slot[session.engine][session.slot] = session
        return session

    def get(self, owner: str, session_id: str) -> Session:
        """Gives a live session; one that has been idle for too long is live until the next sweep.

        Raises:
            UnknownSession: None of that id is known to its owner.
            SessionGone: It was deleted, has expired or was evicted.
        """
        session = self.live.get(key_of(owner, session_id))
        if session is None:
            raise self.missing(owner, session_id)
        return session

    async def find(self, owner: str, session_id: str) -> Session:
        """Gives a session, wherever it is; raises as `get` does."""
        return self.get(owner, session_id)

    async def make(
        self,
        engine: Engine,
        states: dict[str, Array] | None,
        owner: str,
        session_id: str | None,
        origin: bytes,
        position: int = 0,
    ) -> tuple[Session, bool]:
        """Makes a session, wherever it is kept, as `create` does."""
        return self.create(engine, states, owner, session_id, origin, position)

    async def begin_anew(self, engine: Engine, owner: str, session_id: str, origin: bytes) -> Session:
        """Makes a session from zeros in place of whatever is or was there under its id.

        Whoever waits for a turn in the session before is told that it was deleted.

        Raises:
            ModelVersionNotHere: A session of that id waits for a version of a model that is not served here.
            ServerFull: There are as many sessions as may be.
        """
        key = key_of(owner, session_id)
        if key in self.elsewhere:
            raise self.missing(owner, session_id)
        while (before := self.live.get(key)) is not None:
            with suppress(SessionGone, UnknownSession):
                async with self.alone(before):
                    self._end(before, "deleted")
        if engine not in self.by_slot:  # it was unloaded while the session was waited for
            raise ModelVersionNotHere(f"{engine.model.key} was just unloaded: send the request again")
        session = self._made(engine, None, owner, session_id, origin)
        self.gone.pop(key, None)
        return session

    async def states(self, session: Session) -> tuple[dict[str, Array], int]:
        """Gives a session's states and its position."""
        self.touch(session)
        return session.engine.arena.read(session.slot), session.position

    def is_current(self, session: Session, request: Request | None) -> bool:
        """Says whether a change of a session may begin with what is in its slot."""
        return True

    async def follow(self, session: Session, request: Request | None) -> None:
        """Makes sure that a session whose turn this is is as it stands elsewhere: there is no elsewhere."""

    async def put_states(
        self,
        session: Session,
        states: dict[str, Array] | None,
        request: Request | None,
        moves: int = 1,
        before: dict[str, Array] | None = None,
    ) -> None:
        """Sets the states of a session whose turn this is.

        Args:
            session: The session.
            states: By name; None for zeros.
            request: The change that this is.
            moves: By how much it moves the position.
            before: The states before it, where a repetition is to be computed from them.
        """
        session.engine.arena.write(session.slot, states)
        session.engine.arena.position[session.slot] += moves
        if request is not None:
            session.applied = Applied(request, session.position, None, before)

    async def page(self, owner: str, after: tuple[int, int], limit: int) -> tuple[list[Listed], tuple[int, int] | None]:
        """Gives some of an owner's sessions, and after which to go on; those that live throughout are given once.

        Args:
            owner: Whose.
            after: The number of an engine and of a slot in it, as the page before has given it.
            limit: How many, at most.
        """
        first, beyond = after
        found: list[Listed] = []
        for engine, sessions in self.by_slot.items():
            number = self._numbers[engine]
            if number < first:
                continue
            for slot in range(beyond if number == first else 0, engine.arena.capacity):
                session = sessions.get(slot)
                if session is not None and session.owner == owner:
                    if len(found) == limit:
                        return found, (number, slot)
                    found.append(Listed(session.id, session.model.name, session.model.version, session.position))
        return found, None

    def new_id(self) -> str:
        """Draws an id: 128 random bits."""
        return secrets.token_hex(16)

    def touch(self, session: Session) -> None:
        """Counts as using a session, as stepping it does."""
        session.engine.arena.used[session.slot] = self.clock()

    async def fork(
        self, session: Session, new_id: str | None, origin: bytes, position: int | None = None
    ) -> tuple[Session, bool]:
        """Makes a session with the state and the position that another has, in its turn.

        Args:
            session: The other.
            new_id: Where the client chooses it; then the call may be repeated.
            origin: Digest of the request.
            position: Where the other is to be.

        Raises:
            SessionExists, ServerFull: As `create` does.
            SessionGone, PositionConflict, SessionWentBack: As `step` does.
        """
        if new_id is not None and key_of(session.owner, new_id) in self.live:
            return self.create(session.engine, None, session.owner, new_id, origin)  # a repetition, or refused
        async with self.alone(session):
            if position is not None:
                check(session.position, None, Request(position, b""))
            states = session.engine.arena.read(session.slot)
            return self.create(session.engine, states, session.owner, new_id, origin, session.position)

    async def delete(self, owner: str, session_id: str, position: int | None = None) -> None:
        """Deletes a session when those before it have had their turn; a repeated call changes nothing.

        Raises:
            UnknownSession: None of that id is known.
            SessionGone: It had gone for another reason.
            PositionConflict, SessionWentBack: It is not at the position that was given.
        """
        tombstone = self.gone.get(key_of(owner, session_id))
        if tombstone is None or tombstone.reason != "deleted":
            async with self.alone(self.get(owner, session_id)) as session:
                if position is not None:
                    check(session.position, None, Request(position, b""))
                self._end(session, "deleted")

    def sweep(self) -> None:
        """Ends the sessions that have been idle for too long, and forgets old tombstones."""
        now = self.clock()
        for engine, sessions in self.by_slot.items():
            arena = engine.arena
            for slot in np.flatnonzero((arena.used <= now - self.idle_seconds) & ~arena.held).tolist():
                self._end(sessions[slot], "expired")
        while self.gone and next(iter(self.gone.values())).until <= now:
            self.gone.popitem(last=False)

    def _room(self, engine: Engine) -> int:
        """Takes a slot for a new session, and makes room for it where that is wanted."""
        for make_room in (None, self.sweep, self._evict if self.when_full == "evict" else None):
            if make_room is not None:
                make_room()
            slot = engine.arena.take() if len(self.live) < self.max_sessions else None
            if slot is not None:
                return slot
        raise self.full()

    def full(self) -> ServerFull:
        """Gives what to raise where there are as many sessions as may be."""
        return ServerFull(
            f"there are {self.max_sessions} live sessions, as many as may be: delete some, or try again when one has "
            f"been idle for {self.idle_seconds:g} seconds"
        )

    def _evict(self) -> None:
        """Ends the session that has been idle for the longest time, of those that nothing is under way in."""
        longest: tuple[float, Session] | None = None
        for engine, sessions in self.by_slot.items():
            arena = engine.arena
            slot = int(np.argmin(np.where(arena.held, np.inf, arena.used)))
            if np.isfinite(arena.used[slot]) and not arena.held[slot] and (
                longest is None or arena.used[slot] < longest[0]
            ):  # fmt: skip
                longest = float(arena.used[slot]), sessions[slot]
        if longest is not None:
            self._end(longest[1], "evicted")

    @asynccontextmanager
    async def alone(self, session: Session) -> AsyncIterator[Session]:
        """Waits until the session is this request's alone, after those that came before it."""
        if not session.alive:
            raise self.missing(session.owner, session.id)
        turns = self.turns[session.engine]
        await turns.enter((session,), session.slots)
        if not session.alive:
            raise self.missing(session.owner, session.id)
        try:
            yield session
        finally:
            if session.alive:
                self.touch(session)
                turns.leave(session.slots)

    def _settle(self, engine: Engine, slots: Slots, steps: Array) -> Array:
        """Notes that sessions have moved by so many steps, and leaves them; gives their positions."""
        arena = engine.arena
        positions: Array = arena.position[slots] + steps
        arena.position[slots] = positions
        arena.used[slots] = self.clock()
        self.turns[engine].leave(slots)
        return positions

    def _end(self, session: Session, reason: str) -> None:
        """Ends a session that nobody else holds; who waits for it is told that it is gone."""
        self.ended[reason] += 1
        until = self.clock() + self._tombstone_seconds
        self.gone[key_of(session.owner, session.id)] = Tombstone(reason, session.position, until)
        self.release(session)

    def release(self, session: Session) -> None:
        """Frees a session's slot."""
        arena, slot = session.engine.arena, session.slot
        session.alive = False
        self.endings += 1
        del self.live[key_of(session.owner, session.id)], self.by_slot[session.engine][slot]
        arena.used[slot] = np.inf
        self.turns[session.engine].end(slot)
        arena.give_back(session.slots)

    def missing(self, owner: str, session_id: str) -> Problem:
        """Gives what to raise where a session is not among the live ones."""
        model = self.elsewhere.get(key_of(owner, session_id))
        if model is not None:
            return ModelVersionNotHere(f"the session is of model {model}, which is not here: put it back")
        tombstone = self.gone.get(key_of(owner, session_id))
        return unknown() if tombstone is None else gone(tombstone.reason, tombstone.position)


def unknown() -> UnknownSession:
    """Gives what to raise where a session was never heard of."""
    return UnknownSession("there is no session of that id: create one with POST /sessions")


def gone(reason: str, position: int) -> SessionGone:
    """Gives what to raise where a session is there no more."""
    what, advice = {
        "deleted": ("was deleted", "create another"),
        "expired": ("expired", "create another, use it more often"),
        "evicted": ("was evicted to make room", "create another"),
    }[reason]
    return SessionGone(f"the session {what} at position {position}: {advice}", reason=reason, position=position)


def key_of(owner: str, session_id: str) -> str:
    """Names a session among those of all owners; no owner's name has a slash in it."""
    return f"{owner}/{session_id}" if owner else session_id
