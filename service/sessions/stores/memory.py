"""Sessions in this process's memory: the slots of the table are the store itself."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import numpy as np

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.scheduler import Moved
from cellserve.service.errors import (
    ModelVersionNotHere,
    Problem,
    ServerFull,
    SessionExists,
    SessionGone,
    UnknownSession,
)
from cellserve.service.idempotency import Applied, Request, check
from cellserve.service.sessions.session import Durable, Listed, Session, gone, key_of, unknown
from cellserve.service.sessions.stores.protocol import Page, States
from cellserve.service.sessions.table import SessionTable
from cellserve.service.settings import WhenFull


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is left of a session that has ended."""

    reason: str
    position: int
    until: float  # seconds of the table's clock


def new_id() -> str:
    """Draws a session's id: 128 random bits."""
    return secrets.token_hex(16)


def full(max_sessions: int, idle_seconds: float) -> ServerFull:
    """Makes the error for one session too many."""
    return ServerFull(
        f"there are {max_sessions} live sessions, as many as may be: delete some, or try again when one has "
        f"been idle for {idle_seconds:g} seconds"
    )


class MemoryStore:
    """The sessions of one process; a `SessionStore`.

    Args:
        table: Their slots.
        max_sessions: Live sessions, at most.
        tombstone_seconds: How long ended sessions are answered 410 instead of 404.
        when_full: On a full table, refuse one session more, or evict the longest idle one.
        durable: What its sessions outlive.
    """

    def __init__(
        self,
        table: SessionTable,
        max_sessions: int,
        tombstone_seconds: float,
        when_full: WhenFull = "refuse",
        durable: Durable = "none",
    ) -> None:
        self.table, self.durable = table, durable
        self.max_sessions, self.when_full = max_sessions, when_full
        self._tombstone_seconds = tombstone_seconds
        self.tombstones: OrderedDict[str, Tombstone] = OrderedDict()  # the oldest first
        self.waiting: dict[str, str] = {}  # sessions that wait for a version of a model that is not served here
        self.created = 0
        self.ended = dict.fromkeys(("deleted", "expired", "evicted"), 0)
        self.errors = 0

    async def start(self) -> None:
        """Has nothing to look over."""

    async def close(self) -> None:
        """Has nothing to close."""

    async def count(self) -> int:
        """Counts the live sessions."""
        return len(self.table)

    def get(self, owner: str, session_id: str) -> Session:
        """Returns a live session; expiry is enforced by `sweep`, not here."""
        session = self.table.live.get(key_of(owner, session_id))
        if session is None:
            raise self.missing(owner, session_id)
        return session

    async def find(self, owner: str, session_id: str) -> Session:
        """Returns a live session."""
        return self.get(owner, session_id)

    def missing(self, owner: str, session_id: str) -> Problem:
        """Makes the error for a session that is not among the live ones."""
        model = self.waiting.get(key_of(owner, session_id))
        if model is not None:
            return ModelVersionNotHere(f"the session is of model {model}, which is not here: put it back")
        tombstone = self.tombstones.get(key_of(owner, session_id))
        return unknown() if tombstone is None else gone(tombstone.reason, tombstone.position)

    def is_current(self, session: Session, key: Request | None) -> bool:
        """The slot is the session."""
        return True

    def all_current(self, sessions: Sequence[Session]) -> bool:
        """The slots are the sessions."""
        return True

    async def refresh(self, session: Session, key: Request | None) -> None:
        """The slot is the session."""

    def commit(self, engine: Engine, batch: Sequence[Moved]) -> Awaitable[None] | None:
        """Has nothing to write: the engine has moved the slots."""
        return None

    async def write_state(
        self, session: Session, states: States | None, key: Request | None, moves: int, before: States | None
    ) -> None:
        """Sets a locked session's states."""
        session.engine.arena.write(session.slot, states)
        session.engine.arena.position[session.slot] += moves
        if key is not None:
            session.applied = Applied(key, session.position, None, before)

    async def read_state(self, session: Session) -> tuple[States, int]:
        """Returns a session's states and its position."""
        self.table.touch(session)
        return session.engine.arena.read(session.slot), session.position

    async def create(
        self,
        engine: Engine,
        states: States | None,
        owner: str,
        session_id: str | None,
        origin: bytes,
        position: int = 0,
    ) -> tuple[Session, bool]:
        """Makes a session from zeros or from given states."""
        return self.create_now(engine, states, owner, session_id, origin, position)

    def create_now(
        self,
        engine: Engine,
        states: States | None = None,
        owner: str = "",
        session_id: str | None = None,
        origin: bytes = b"",
        position: int = 0,
    ) -> tuple[Session, bool]:
        """Makes a session as `create` does, without waiting."""
        if session_id is not None:
            key = key_of(owner, session_id)
            known = self.table.live.get(key)
            if known is not None:
                if known.origin != origin:
                    raise SessionExists(
                        f"there is a session {session_id!r} already, which another request has made (of model "
                        f"{known.model.name!r}): choose another id, or repeat that request",
                        position=known.position,
                    )
                self.table.touch(known)
                return known, False
            if key in self.tombstones or key in self.waiting:
                raise self.missing(owner, session_id)
        return self._make(engine, states, owner, session_id or new_id(), origin, position), True

    async def recreate(self, engine: Engine, owner: str, session_id: str, origin: bytes) -> Session:
        """Makes a session from zeros in place of whatever is or was there under its id."""
        key = key_of(owner, session_id)
        if key in self.waiting:
            raise self.missing(owner, session_id)
        while (before := self.table.live.get(key)) is not None:
            with suppress(SessionGone, UnknownSession):
                async with self._alone(before):
                    self._end(before, "deleted")
        if engine not in self.table.by_slot:  # it was unloaded while the lock was waited for
            raise ModelVersionNotHere(f"{engine.model.key} was just unloaded: send the request again")
        session = self._make(engine, None, owner, session_id, origin)
        self.tombstones.pop(key, None)
        return session

    async def fork(
        self, session: Session, new_id: str | None, origin: bytes, position: int | None = None
    ) -> tuple[Session, bool]:
        """Makes a session with the state and the position of another."""
        if new_id is not None and key_of(session.owner, new_id) in self.table.live:
            # A repetition, or refused.
            return self.create_now(session.engine, None, session.owner, new_id, origin)
        async with self._alone(session):
            if position is not None:
                check(session.position, None, Request(position, b""))
            states = session.engine.arena.read(session.slot)
            return self.create_now(session.engine, states, session.owner, new_id, origin, session.position)

    async def delete(self, owner: str, session_id: str, position: int | None = None) -> None:
        """Deletes a session when those before have had their turn."""
        tombstone = self.tombstones.get(key_of(owner, session_id))
        if tombstone is None or tombstone.reason != "deleted":
            async with self._alone(self.get(owner, session_id)) as session:
                if position is not None:
                    check(session.position, None, Request(position, b""))
                self._end(session, "deleted")

    async def page(self, owner: str, after: Page, limit: int) -> tuple[list[Listed], Page | None]:
        """Returns some of an owner's sessions; those that live throughout are on one page each.

        The cursor is an engine's number and a slot in its arena.
        """
        first, beyond = after
        found: list[Listed] = []
        for engine, sessions in self.table.by_slot.items():
            number = self.table.numbers[engine]
            if number < first:
                continue
            for slot in range(beyond if number == first else 0, engine.arena.capacity):
                session = sessions.get(slot)
                if session is not None and session.owner == owner:
                    if len(found) == limit:
                        return found, (number, slot)
                    found.append(Listed(session.id, session.model.name, session.model.version, session.position))
        return found, None

    def sweep(self) -> None:
        """Ends the sessions that have been idle for too long, and forgets old tombstones."""
        for session in list(self.table.idle()):
            self._end(session, "expired")
        now = self.table.clock()
        while self.tombstones and next(iter(self.tombstones.values())).until <= now:
            self.tombstones.popitem(last=False)

    @asynccontextmanager
    async def _alone(self, session: Session) -> AsyncIterator[Session]:
        """Holds a session's lock; raises `missing` where it has ended."""
        if not session.alive:
            raise self.missing(session.owner, session.id)
        async with self.table.locks[session.engine].locked(session):
            if not session.alive:
                raise self.missing(session.owner, session.id)
            try:
                yield session
            finally:
                if session.alive:
                    self.table.touch(session)

    def _make(
        self, engine: Engine, states: States | None, owner: str, session_id: str, origin: bytes, position: int = 0
    ) -> Session:
        slot = self._allocate(engine)
        arena = engine.arena
        if states is not None:
            arena.write(slot, states)
        arena.position[slot], arena.used[slot] = position, self.table.clock()
        self.created += 1
        return self.table.add(Session(owner, session_id, engine, slot, np.array((slot,)), origin))

    def _allocate(self, engine: Engine) -> int:
        """Takes a slot for a new session, and makes room for it where that is wanted."""
        for make_room in (None, self.sweep, self._evict if self.when_full == "evict" else None):
            if make_room is not None:
                make_room()
            slot = engine.arena.take() if len(self.table) < self.max_sessions else None
            if slot is not None:
                return slot
        raise full(self.max_sessions, self.table.idle_seconds)

    def _evict(self) -> None:
        """Ends the session that has been idle for the longest time, of those that are not locked."""
        candidates = [session for engine in self.table.by_slot if (session := self.table.longest_idle(engine))]
        if candidates:
            self._end(min(candidates, key=lambda one: float(one.engine.arena.used[one.slot])), "evicted")

    def _end(self, session: Session, reason: str) -> None:
        """Ends a session that nobody else has locked; whoever waits for it learns that it is gone."""
        self.ended[reason] += 1
        until = self.table.clock() + self._tombstone_seconds
        self.tombstones[key_of(session.owner, session.id)] = Tombstone(reason, session.position, until)
        self.table.remove(session)
