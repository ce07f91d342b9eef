"""Sessions in a shared Redis: the slots of the table are a cache of them, and every commit detects a stale one."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.scheduler import Advance, Moved
from cellserve.service.engine.state_arena import Arena
from cellserve.service.errors import (
    ModelVersionNotHere,
    Problem,
    ServerFull,
    SessionExists,
    SessionWentBack,
    Stale,
    StoreAway,
)
from cellserve.service.idempotency import Applied, Request, check
from cellserve.service.model_repository.repository import VersionKey
from cellserve.service.sessions.session import Durable, Listed, Session, gone, key_of, unknown
from cellserve.service.sessions.stores.memory import full, new_id
from cellserve.service.sessions.stores.protocol import Page, States
from cellserve.service.sessions.stores.records import Fate, Last, Mark, Stored, Write, new_revisions
from cellserve.service.sessions.stores.redis_client import RedisClient
from cellserve.service.sessions.table import SessionTable
from cellserve.service.settings import WhenFull

Array = NDArray[Any]
LoadEngine = Callable[[VersionKey, str], Awaitable[Engine | None]]

_INDEX_SHARE = 0.1  # the deadline in Redis is refreshed only after this fraction of the idle time


class RedisStore:
    """The sessions of a shared Redis, those that are in use here in slots; a `SessionStore`.

    Args:
        client: Speaks to Redis.
        table: Their slots.
        cached: Sessions of a model that have slots here, at most.
        max_sessions: Live sessions, at most.
        when_full: Refuse one session more, or evict the longest idle one.
        load: Returns the engine of a version by its name and digest, loaded where it has to be.
    """

    durable: Durable = "store"

    def __init__(
        self,
        client: RedisClient,
        table: SessionTable,
        cached: int,
        max_sessions: int,
        when_full: WhenFull = "refuse",
        load: LoadEngine | None = None,
    ) -> None:
        self.table, self.max_sessions, self.when_full = table, max_sessions, when_full
        self._client, self._most_cached, self._load = client, cached, load
        self.created = 0
        self.ended = dict.fromkeys(("deleted", "expired", "evicted"), 0)

    @property
    def errors(self) -> int:
        """How often Redis did not answer, so far."""
        return self._client.errors

    async def start(self) -> None:
        """Looks Redis over; if it is away now, whatever needs it tries again."""
        with suppress(StoreAway):
            await self._client.start()

    async def close(self) -> None:
        """Closes the connections to Redis."""
        await self._client.close()

    async def count(self) -> int:
        """Counts the sessions in Redis; raises StoreAway."""
        live, expired = await self._client.count()
        self.ended["expired"] += expired
        return live

    def get(self, owner: str, session_id: str) -> Session:
        """Returns a session that has a slot here."""
        session = self.table.live.get(key_of(owner, session_id))
        if session is None:
            raise self.missing(owner, session_id)
        return session

    async def find(self, owner: str, session_id: str) -> Session:
        """Returns a session, from its slot or from Redis."""
        key = key_of(owner, session_id)
        session = self.table.live.get(key)
        return session if session is not None else await self._cached(owner, session_id, await self._client.load(key))

    def missing(self, owner: str, session_id: str) -> Problem:
        """Makes the error for a session that has no slot here any more: it may be in Redis."""
        return Stale()

    async def _reload(self, session: Session) -> None:
        """Reads a locked session again.

        Raises:
            SessionGone, UnknownSession: It is there no more.
            StoreAway: The store does not answer.
        """
        stored = await self._client.load(key_of(session.owner, session.id))
        if not isinstance(stored, Stored) or stored.digest != session.model.digest:
            self._forget(session)
            raise self._fate(stored)
        self._fill(session, stored)

    def is_current(self, session: Session, key: Request | None) -> bool:
        """Tells whether a change may start from what is in the slot; a commit detects what is stale all the same."""
        return session.revision is not None and (key is None or key.position == session.position)

    def all_current(self, sessions: Sequence[Session]) -> bool:
        """Tells whether all slots hold what was last written or read."""
        return all(session.revision is not None for session in sessions)

    async def refresh(self, session: Session, key: Request | None) -> None:
        """Reads a locked session again, unless a change with this key may start from what is in its slot."""
        if self.is_current(session, key):
            return
        known, seen = session.revision is not None, session.position
        await self._reload(session)
        if known and session.position < seen and key is None:
            raise _went_back(session, seen)

    async def create(
        self,
        engine: Engine,
        states: States | None,
        owner: str,
        session_id: str | None,
        origin: bytes,
        position: int = 0,
    ) -> tuple[Session, bool]:
        """Makes a session in Redis, and gives it a slot."""
        name = session_id if session_id is not None else new_id()
        key = key_of(owner, name)
        found = None if session_id is None else await self._client.load(key)
        outcome = "there"
        if found is None:
            await self._enforce_capacity()
            new = _new(engine, states, origin, position)
            outcome = await self._client.create(key, new)
            self.created += outcome == "written"
            found = new if outcome == "written" else await self._client.load(key)
        session = await self._cached(owner, name, found)
        if session.origin != origin:
            raise SessionExists(
                f"there is a session {name!r} already, which another request has made: choose another id",
                position=session.position,
            )
        return session, outcome == "written"

    async def recreate(self, engine: Engine, owner: str, session_id: str, origin: bytes) -> Session:
        """Makes a session from zeros in Redis, in place of whatever is or was there under its id."""
        key = key_of(owner, session_id)
        if not isinstance(await self._client.load(key), Stored):
            await self._enforce_capacity()
        new = _new(engine, None, origin)
        await self._client.replace(key, new)
        before = self.table.live.get(key)
        if before is not None:
            # What is under way in it is refused when it is written.
            with suppress(Stale):
                async with self._alone(before):
                    self._forget(before)
        return await self._cached(owner, session_id, new)

    async def fork(
        self, session: Session, new_id: str | None, origin: bytes, position: int | None = None
    ) -> tuple[Session, bool]:
        """Makes a session with the state and the position that another has in the store."""
        async with self._alone(session):
            await self._reload(session)
            known = None if new_id is None else await self._client.load(key_of(session.owner, new_id))
            if position is not None and known is None:
                check(session.position, None, Request(position, b""))
            states = session.engine.arena.read(session.slot)
            return await self.create(session.engine, states, session.owner, new_id, origin, session.position)

    async def delete(self, owner: str, session_id: str, position: int | None = None) -> None:
        """Deletes a session; a repeated call changes nothing."""
        key = key_of(owner, session_id)
        outcome = await self._client.end(key, "deleted", position)
        self.ended["deleted"] += outcome == "written"
        session = self.table.live.get(key)
        if outcome == "other":
            found = await self._client.load(key)
            if isinstance(found, Stored) and position is not None:
                check(found.mark.position, None, Request(position, b""))
            raise self._fate(found)
        if session is not None:
            with suppress(Stale):  # someone else has seen that it is gone
                async with self._alone(session):
                    self._forget(session)
        if outcome == "gone":
            fate = await self._client.load(key)
            if not isinstance(fate, Fate) or fate.reason != "deleted":
                raise self._fate(fate)

    async def page(self, owner: str, after: Page, limit: int) -> tuple[list[Listed], Page | None]:
        """Returns about so many of an owner's sessions; those that live throughout are on one page at least."""
        prefix = key_of(owner, "") if owner else ""
        found, cursor = await self._client.page(prefix, after[1], limit)
        listed = [Listed(key[len(prefix) :], model, version, position) for key, model, version, position in found]
        return listed, (0, cursor) if cursor else None

    async def read_state(self, session: Session) -> tuple[States, int]:
        """Returns a session's states and position, as Redis has them."""
        async with self._alone(session):
            await self._reload(session)
            return session.engine.arena.read(session.slot), session.position

    async def write_state(
        self, session: Session, states: States | None, key: Request | None, moves: int, before: States | None
    ) -> None:
        """Writes a locked session's states."""
        position = session.position + moves
        applied = last = None
        if key is not None:
            applied = Applied(key, position, None, before)
            content = (Last.NOTHING,) if before is None else (Last.BEFORE, _packed(session.engine.arena, before))
            last = Last(key.digest, key.position, position, *content)
        write = self._write_of(session, Mark(position, *new_revisions(1)), _packed(session.engine.arena, states), last)
        session.revision = None
        (outcome,) = await self._client.write([write])
        if outcome != "written":
            raise Stale()
        session.engine.arena.write(session.slot, states)
        session.engine.arena.position[session.slot] = position
        session.applied, session.revision = applied, write.mark.revision

    def sweep(self) -> None:
        """Drops from the cache what has not been used here for long; Redis ends what nobody uses."""
        for session in list(self.table.idle()):
            self._forget(session)

    @asynccontextmanager
    async def _alone(self, session: Session) -> AsyncIterator[Session]:
        """Holds the lock of a session that has a slot; raises Stale where it has lost it."""
        if not session.alive:
            raise Stale()
        async with self.table.locks[session.engine].locked(session):
            if not session.alive:
                raise Stale()
            try:
                yield session
            finally:
                if session.alive:
                    self.table.touch(session)

    async def _enforce_capacity(self) -> None:
        """Sees to it that there are not too many sessions."""
        if await self.count() < self.max_sessions:
            return
        longest = await self._client.longest_idle() if self.when_full == "evict" else None
        if longest is None:
            raise full(self.max_sessions, self.table.idle_seconds)
        if await self._client.end(longest, "evicted") == "written":
            self.ended["evicted"] += 1
        session = self.table.live.get(longest)
        if session is not None and not session.engine.arena.held[session.slot]:
            self._forget(session)

    async def _cached(self, owner: str, session_id: str, stored: Stored | Fate | None) -> Session:
        if not isinstance(stored, Stored):
            raise self._fate(stored)
        engine = next((engine for engine in self.table.by_slot if engine.model.digest == stored.digest), None)
        if engine is None and self._load is not None:
            engine = await self._load(VersionKey(stored.model, stored.version), stored.digest)
        if engine is None:
            raise ModelVersionNotHere(
                f"the session is of model {stored.model!r}, version {stored.version}, which this server has not "
                f"(yet): try again in a few seconds, another one may have it"
            )
        known = self.table.live.get(key_of(owner, session_id))
        if known is not None:
            return known
        slot = self._slot(engine)
        session = self.table.add(Session(owner, session_id, engine, slot, np.array((slot,)), stored.origin))
        self._fill(session, stored)
        return session

    def _slot(self, engine: Engine) -> int:
        """Takes a slot; where all are in use, that of the session which was not used here for the longest time."""
        arena = engine.arena
        slot = arena.take() if len(self.table.by_slot[engine]) < self._most_cached else None
        if slot is None:
            oldest = self.table.longest_idle(engine)
            if oldest is None:
                raise ServerFull("work is under way in all sessions that this server has room for: try again")
            self._forget(oldest)
            slot = arena.take()
        assert slot is not None
        return slot

    def _fill(self, session: Session, stored: Stored) -> None:
        arena = session.engine.arena
        arena.write(session.slot, _unpacked(arena, stored.states))
        arena.position[session.slot], arena.used[session.slot] = stored.mark.position, self.table.clock()
        session.applied, last = None, stored.last
        if last is not None:
            y = before = None
            if last.kind == Last.ANSWER:
                outputs = session.model.outputs
                y = np.frombuffer(last.content, outputs.dtype).reshape(-1, *outputs.shape)
            elif last.kind == Last.BEFORE:
                before = _unpacked(arena, last.content)
            session.applied = Applied(Request(last.position, last.digest), last.reached, y, before)
        session.revision = stored.mark.revision

    def _forget(self, session: Session) -> None:
        """Frees a session's slot; the store has it still, or knows what became of it."""
        session.revision = None
        self.table.remove(session)

    async def commit(self, engine: Engine, batch: Sequence[Moved]) -> None:
        """Writes what a tick has come to, in one round trip; notes with each advance why rows were refused."""
        places = [
            (advance, row, y)
            for advance, y in batch
            for row in range(advance.rows)
            if not advance.problems or row not in advance.problems
        ]
        arena, of_slot = engine.arena, self.table.by_slot[engine]
        slots = np.array([advance.homes[row] for advance, row, _ in places], np.intp)
        sessions = [of_slot[slot] for slot in slots.tolist()]
        positions = (arena.position[slots] + [advance.x.shape[1] for advance, _, _ in places]).tolist()
        marks = list(map(Mark, positions, new_revisions(len(places))))
        lasts = [_last(arena, *place, mark) for place, mark in zip(places, marks, strict=True)]
        writes = list(map(self._write_of, sessions, marks, arena.pack(slots), lasts))
        late = self._late(sessions)
        for session in sessions:
            session.revision = None  # the slot holds what is not written yet: if it never is, it must be read again
        outcomes: list[str] | list[StoreAway]
        try:
            outcomes = await self._client.write(writes, [key_of(one.owner, one.id) for one in late])
        except StoreAway as away:
            outcomes = [away] * len(writes)
            for session in late:
                session.indexed = -math.inf
        for session, mark, (advance, row, _), outcome in zip(sessions, marks, places, outcomes, strict=True):
            if outcome == "written":
                session.revision = mark.revision
            else:
                problem = outcome if isinstance(outcome, Problem) else Stale()
                advance.problems = (advance.problems or {}) | {row: problem}

    def _write_of(self, session: Session, mark: Mark, states: bytes, last: Last | None) -> Write:
        seen = Mark(session.position, session.revision or b"")
        return Write(key_of(session.owner, session.id), seen, mark, states, last)

    def _late(self, sessions: list[Session]) -> list[Session]:
        """Gives the sessions whose deadline in the set of all is to be moved, and notes that it is."""
        now = time.monotonic()
        before = now - _INDEX_SHARE * self.table.idle_seconds
        late = [session for session in sessions if session.indexed < before]
        for session in late:
            session.indexed = now
        return late

    def _fate(self, found: Stored | Fate | None) -> Problem:
        if isinstance(found, Stored):
            return Stale()  # another session of that id, or on another version
        return unknown() if found is None else gone(found.reason, found.position)


def _last(arena: Arena, advance: Advance, row: int, y: Array, mark: Mark) -> Last | None:
    """Gives what a repetition of a row's step is to be told."""
    if advance.keys is None:
        return None
    request = advance.keys[row]
    told = request.digest, request.position, mark.position
    if advance.before is not None:
        return Last(*told, Last.BEFORE, _packed(arena, advance.before[row]))
    return Last(*told, Last.ANSWER, y[row].tobytes())


def _new(engine: Engine, states: States | None, origin: bytes, position: int = 0) -> Stored:
    """Gives what the store is to hold of a session that begins."""
    model, mark = engine.model, Mark(position, *new_revisions(1))
    return Stored(model.name, model.version, model.digest, origin, mark, _packed(engine.arena, states))


def _packed(arena: Arena, states: States | None) -> bytes:
    """Writes one session's states one after the other; zeros where it has none."""
    parts = (np.zeros(spec.shape, spec.dtype) if states is None else states[spec.name] for spec in arena.specs)
    return b"".join(part.tobytes() for part in parts)


def _unpacked(arena: Arena, content: bytes) -> States:
    states, start = {}, 0
    for spec in arena.specs:
        size = int(np.prod(spec.shape))
        states[spec.name] = np.frombuffer(content, spec.dtype, size, start).reshape(spec.shape)
        start += states[spec.name].nbytes
    return states


def _went_back(session: Session, seen: int) -> SessionWentBack:
    return SessionWentBack(
        f"the session was at {seen} and is at {session.position} in its store, which has lost acknowledged changes (a "
        f"failover, a restart without its file): send the steps from {session.position} on again",
        position=session.position,
    )
