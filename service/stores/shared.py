"""Sessions of a shared store: this process's slots are a cache of them, whose staleness every write finds out."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arena import Arena
from service.engine import Engine
from service.errors import ModelVersionNotHere, Problem, ServerFull, SessionExists, SessionWentBack, Stale, StoreAway
from service.exactly_once import Applied, Request, check
from service.repository import VersionKey
from service.sessions import Listed, Session, SessionTable, gone, key_of, unknown
from service.stores.records import Fate, Last, Mark, Stored, Write, new_revisions
from service.stores.redis import RedisStore
from service.ticks import Advance

Array = NDArray[Any]

_INDEX_SHARE = 0.1  # of the idle time that a session's deadline in the set of all may be behind


class SharedTable(SessionTable):
    """The sessions of a shared store, as far as this process has them in its slots.

    Args:
        store: The store.
        cached: Sessions of a model that have slots here, at most.
        more: As `SessionTable` takes it.
    """

    shared = True

    def __init__(self, store: RedisStore, cached: int, *more: Any, **named: Any) -> None:
        super().__init__(*more, **named)
        self.cached = cached
        self.durable = "store"
        self._store = store

    @property
    def store_errors(self) -> int:
        """How often the store did not answer, so far."""
        return self._store.errors

    async def start(self) -> None:
        """Looks the store over; one that is away now is tried again by whatever needs it."""
        with suppress(StoreAway):
            await self._store.start()

    async def close(self) -> None:
        """Ends the connections to the store."""
        await self._store.close()

    async def count(self) -> int:
        """Counts the sessions of the store; raises StoreAway."""
        live, expired = await self._store.count()
        self.ended["expired"] += expired
        return live

    def serve(self, engine: Engine) -> None:
        """Takes charge of an engine's sessions."""
        super().serve(engine)
        engine.commit = partial(self._commit, engine)

    async def find(self, owner: str, session_id: str) -> Session:
        """Gives a session, from its slot or from the store."""
        key = key_of(owner, session_id)
        session = self.live.get(key)
        return session if session is not None else await self._cached(owner, session_id, await self._store.load(key))

    async def fresh(self, session: Session) -> None:
        """Reads a session whose turn this is again from the store.

        Raises:
            SessionGone, UnknownSession: It is there no more.
            StoreAway: The store does not answer.
        """
        stored = await self._store.load(key_of(session.owner, session.id))
        if not isinstance(stored, Stored) or stored.digest != session.model.digest:
            self._forget(session)
            raise self._fate(stored)
        self._fill(session, stored)

    def is_current(self, session: Session, request: Request | None) -> bool:
        """Says whether a change may begin with what is in the slot: what is stale is found out when it is written."""
        return session.revision is not None and (request is None or request.position == session.position)

    async def follow(self, session: Session, request: Request | None) -> None:
        """Makes sure, in its turn, that a change of a session begins where it seems to.

        Raises:
            SessionWentBack: The store has lost changes that it had acknowledged.
        """
        if self.is_current(session, request):
            return
        known, seen = session.revision is not None, session.position
        await self.fresh(session)
        if known and session.position < seen and request is None:
            raise _went_back(session, seen)

    async def make(
        self,
        engine: Engine,
        states: dict[str, Array] | None,
        owner: str,
        session_id: str | None,
        origin: bytes,
        position: int = 0,
    ) -> tuple[Session, bool]:
        """Makes a session in the store, as `SessionTable.make` does in its own memory."""
        name = session_id if session_id is not None else self.new_id()
        key = key_of(owner, name)
        found = None if session_id is None else await self._store.load(key)
        outcome = "there"
        if found is None:
            await self._bound()
            new = _new(engine, states, origin, position)
            outcome = await self._store.create(key, new)
            self.created += outcome == "written"
            found = new if outcome == "written" else await self._store.load(key)
        session = await self._cached(owner, name, found)
        if session.origin != origin:
            raise SessionExists(
                f"there is a session {name!r} already, which another request has made: choose another id",
                position=session.position,
            )
        return session, outcome == "written"

    async def begin_anew(self, engine: Engine, owner: str, session_id: str, origin: bytes) -> Session:
        """Makes a session from zeros in the store, in place of whatever is or was there under its id."""
        key = key_of(owner, session_id)
        if not isinstance(await self._store.load(key), Stored):
            await self._bound()
        new = _new(engine, None, origin)
        await self._store.replace(key, new)
        before = self.live.get(key)
        if before is not None:
            # What is under way in it is refused when it is written.
            with suppress(Stale):
                async with self.alone(before):
                    self._forget(before)
        return await self._cached(owner, session_id, new)

    async def fork(
        self, session: Session, new_id: str | None, origin: bytes, position: int | None = None
    ) -> tuple[Session, bool]:
        """Makes a session with the state and the position that another has in the store."""
        async with self.alone(session):
            await self.fresh(session)
            known = None if new_id is None else await self._store.load(key_of(session.owner, new_id))
            if position is not None and known is None:
                check(session.position, None, Request(position, b""))
            states = session.engine.arena.read(session.slot)
            return await self.make(session.engine, states, session.owner, new_id, origin, session.position)

    async def delete(self, owner: str, session_id: str, position: int | None = None) -> None:
        """Deletes a session; a repeated call changes nothing."""
        key = key_of(owner, session_id)
        outcome = await self._store.end(key, "deleted", position)
        self.ended["deleted"] += outcome == "written"
        session = self.live.get(key)
        if outcome == "other":
            found = await self._store.load(key)
            if isinstance(found, Stored) and position is not None:
                check(found.mark.position, None, Request(position, b""))
            raise self._fate(found)
        if session is not None:
            with suppress(Stale):  # someone else has seen that it is gone
                async with self.alone(session):
                    self._forget(session)
        if outcome == "gone":
            fate = await self._store.load(key)
            if not isinstance(fate, Fate) or fate.reason != "deleted":
                raise self._fate(fate)

    async def page(self, owner: str, after: tuple[int, int], limit: int) -> tuple[list[Listed], tuple[int, int] | None]:
        """Gives about so many of an owner's sessions; those that live throughout are given at least once."""
        prefix = key_of(owner, "") if owner else ""
        found, cursor = await self._store.page(prefix, after[1], limit)
        listed = [Listed(key[len(prefix) :], model, version, position) for key, model, version, position in found]
        return listed, (0, cursor) if cursor else None

    async def states(self, session: Session) -> tuple[dict[str, Array], int]:
        """Gives a session's states and position, as the store has them."""
        async with self.alone(session):
            await self.fresh(session)
            return session.engine.arena.read(session.slot), session.position

    async def put_states(
        self,
        session: Session,
        states: dict[str, Array] | None,
        request: Request | None,
        moves: int = 1,
        before: dict[str, Array] | None = None,
    ) -> None:
        """Writes states of a session whose turn this is; raises Stale where it is another in the store by now."""
        position = session.position + moves
        applied = last = None
        if request is not None:
            applied = Applied(request, position, None, before)
            content = (Last.NOTHING,) if before is None else (Last.BEFORE, _packed(session.engine.arena, before))
            last = Last(request.digest, request.position, position, *content)
        write = self._write_of(session, Mark(position, *new_revisions(1)), _packed(session.engine.arena, states), last)
        session.revision = None
        (outcome,) = await self._store.write([write])
        if outcome != "written":
            raise Stale()
        session.engine.arena.write(session.slot, states)
        session.engine.arena.position[session.slot] = position
        session.applied, session.revision = applied, write.mark.revision

    def sweep(self) -> None:
        """Forgets the sessions that have not been used here for long; the store ends those that nobody uses."""
        now = self.clock()
        for engine, sessions in self.by_slot.items():
            arena = engine.arena
            for slot in np.flatnonzero((arena.used <= now - self.idle_seconds) & ~arena.held).tolist():
                self._forget(sessions[slot])

    async def _bound(self) -> None:
        """Sees to it that there are not too many sessions."""
        if await self.count() < self.max_sessions:
            return
        longest = await self._store.longest_idle() if self.when_full == "evict" else None
        if longest is None:
            raise self.full()
        if await self._store.end(longest, "evicted") == "written":
            self.ended["evicted"] += 1
        session = self.live.get(longest)
        if session is not None and not session.engine.arena.held[session.slot]:
            self._forget(session)

    async def _cached(self, owner: str, session_id: str, stored: Stored | Fate | None) -> Session:
        if not isinstance(stored, Stored):
            raise self._fate(stored)
        engine = next((engine for engine in self.by_slot if engine.model.digest == stored.digest), None)
        if engine is None and self.load is not None:
            engine = await self.load(VersionKey(stored.model, stored.version), stored.digest)
        if engine is None:
            raise ModelVersionNotHere(
                f"the session is of model {stored.model!r}, version {stored.version}, which this server has not "
                f"(yet): try again in a few seconds, another one may have it"
            )
        known = self.live.get(key_of(owner, session_id))
        if known is not None:
            return known
        slot = self._slot(engine)
        session = self.add(Session(owner, session_id, engine, slot, np.array((slot,)), stored.origin))
        self._fill(session, stored)
        return session

    def _slot(self, engine: Engine) -> int:
        """Takes a slot; where all are in use, that of the session which was not used here for the longest time."""
        arena = engine.arena
        slot = arena.take() if len(self.by_slot[engine]) < self.cached else None
        if slot is None:
            idle = np.where(arena.held, np.inf, arena.used)
            oldest = int(np.argmin(idle))
            if not np.isfinite(idle[oldest]):
                raise ServerFull("work is under way in all sessions that this server has room for: try again")
            self._forget(self.by_slot[engine][oldest])
            slot = arena.take()
        assert slot is not None
        return slot

    def _fill(self, session: Session, stored: Stored) -> None:
        arena = session.engine.arena
        arena.write(session.slot, _unpacked(arena, stored.states))
        arena.position[session.slot], arena.used[session.slot] = stored.mark.position, self.clock()
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
        self.release(session)

    async def _commit(self, engine: Engine, moved: list[tuple[Advance, Array]]) -> None:
        """Writes what a tick has come to, in one round trip; notes with each advance why rows were refused."""
        places = [
            (advance, row, y)
            for advance, y in moved
            for row in range(advance.rows)
            if not advance.problems or row not in advance.problems
        ]
        arena, of_slot = engine.arena, self.by_slot[engine]
        slots = np.array([advance.homes[row] for advance, row, _ in places], np.intp)
        sessions = [of_slot[slot] for slot in slots.tolist()]
        positions = (arena.position[slots] + [advance.position for advance, _, _ in places]).tolist()
        marks = list(map(Mark, positions, new_revisions(len(places))))
        lasts = [_last(arena, *place, mark) for place, mark in zip(places, marks, strict=True)]
        writes = list(map(self._write_of, sessions, marks, arena.pack(slots), lasts))
        late = self._late(sessions)
        for session in sessions:
            session.revision = None  # the slot holds what is not written yet: if it never is, it must be read again
        outcomes: list[str] | list[StoreAway]
        try:
            outcomes = await self._store.write(writes, [key_of(one.owner, one.id) for one in late])
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
        before = now - _INDEX_SHARE * self.idle_seconds
        late = [session for session in sessions if session.indexed < before]
        for session in late:
            session.indexed = now
        return late

    def _fate(self, found: Stored | Fate | None) -> Problem:
        if isinstance(found, Stored):
            return Stale()  # another session of that id, or on another version
        return unknown() if found is None else gone(found.reason, found.position)

    def missing(self, owner: str, session_id: str) -> Problem:
        """Gives what to raise where a session has no slot here any more: it may be in the store."""
        return Stale()


def _last(arena: Arena, advance: Advance, row: int, y: Array, mark: Mark) -> Last | None:
    """Gives what a repetition of a row's step is to be told."""
    if advance.requests is None:
        return None
    request = advance.requests[row]
    told = request.digest, request.position, mark.position
    if advance.before is not None:
        return Last(*told, Last.BEFORE, _packed(arena, advance.before[row]))
    return Last(*told, Last.ANSWER, y[row].tobytes())


def _new(engine: Engine, states: dict[str, Array] | None, origin: bytes, position: int = 0) -> Stored:
    """Gives what the store is to hold of a session that begins."""
    model, mark = engine.model, Mark(position, *new_revisions(1))
    return Stored(model.name, model.version, model.digest, origin, mark, _packed(engine.arena, states))


def _packed(arena: Arena, states: dict[str, Array] | None) -> bytes:
    """Writes one session's states one after the other; zeros where it has none."""
    parts = (np.zeros(spec.shape, spec.dtype) if states is None else states[spec.name] for spec in arena.specs)
    return b"".join(part.tobytes() for part in parts)


def _unpacked(arena: Arena, content: bytes) -> dict[str, Array]:
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
