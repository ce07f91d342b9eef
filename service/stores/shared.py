"""Sessions of a shared store: this process's slots are a cache of them, whose staleness every write finds out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arena import Arena
from service.engine import Engine
from service.errors import ModelVersionNotHere, Problem, ServerFull, SessionExists, SessionWentBack, Stale, StoreAway
from service.exactly_once import Applied, Request, check
from service.sessions import Listed, Session, SessionTable, gone, key_of, unknown
from service.stores.redis import Fate, RedisStore, Stored, Write, new_revision
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
        self._revisions: dict[Session, bytes] = {}  # of the state in its slot; without one it must be read again
        self._indexed: dict[Session, float] = {}

    async def start(self) -> None:
        """Looks the store over; one that is away now is tried again by whatever needs it."""
        with suppress(StoreAway):
            await self._store.start()

    async def close(self) -> None:
        """Ends the connections to the store."""
        await self._store.close()

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

    async def follow(self, session: Session, request: Request | None) -> None:
        """Makes sure, in its turn, that a change of a session begins where it seems to.

        Raises:
            SessionWentBack: The store has lost changes that it had acknowledged.
        """
        known = session in self._revisions
        if known and (request is None or request.position == session.position):
            return  # what is stale is found out when it is written
        seen = session.position
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
            told = engine.model.name, engine.model.version, engine.model.digest, position
            new = Stored(*told, new_revision(), _packed(engine.arena, states), origin)
            outcome = await self._store.create(key, new)
            found = new if outcome == "written" else await self._store.load(key)
        session = await self._cached(owner, name, found)
        if session.origin != origin:
            raise SessionExists(
                f"there is a session {name!r} already, which another request has made: choose another id",
                position=session.position,
            )
        return session, outcome == "written"

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
        session = self.live.get(key)
        if outcome == "other":
            found = await self._store.load(key)
            if isinstance(found, Stored) and position is not None:
                check(found.position, None, Request(position, b""))
            raise self._fate(found)
        if session is not None:
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

    async def put_states(self, session: Session, states: dict[str, Array] | None, request: Request | None) -> None:
        """Writes states of a session whose turn this is; raises Stale where it is another in the store by now."""
        position = session.position + 1
        fields: dict[str, bytes | str | int] = {"states": _packed(session.engine.arena, states)}
        applied = session.applied
        if request is not None:
            applied = Applied(request, position)
            fields |= {"asked": request.digest, "asked_at": request.position, "reached": position}
            fields |= {"y": b"", "before": b""}
        revision = new_revision()
        refused = await self._written(session, position, revision, fields)
        if refused is not None:
            raise refused
        session.engine.arena.write(session.slot, states)
        session.engine.arena.position[session.slot] = position
        session.applied, self._revisions[session] = applied, revision

    def sweep(self) -> None:
        """Forgets the sessions that have not been used here for long; the store ends those that nobody uses."""
        now = self.clock()
        for engine, sessions in self.by_slot.items():
            arena = engine.arena
            for slot in np.flatnonzero((arena.used <= now - self.idle_seconds) & ~arena.held).tolist():
                self._forget(sessions[slot])

    async def _bound(self) -> None:
        """Sees to it that there are not too many sessions."""
        if await self._store.count() < self.max_sessions:
            return
        longest = await self._store.longest_idle() if self.when_full == "evict" else None
        if longest is None:
            raise self.full()
        await self._store.end(longest, "evicted")
        session = self.live.get(longest)
        if session is not None and not session.engine.arena.held[session.slot]:
            self._forget(session)

    async def _cached(self, owner: str, session_id: str, stored: Stored | Fate | None) -> Session:
        if not isinstance(stored, Stored):
            raise self._fate(stored)
        engine = next((engine for engine in self.by_slot if engine.model.digest == stored.digest), None)
        if engine is None:
            raise ModelVersionNotHere(
                f"the session is of model {stored.model!r}, version {stored.version}, which this server has not: "
                f"try again, another one may have it"
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
        arena.position[session.slot], arena.used[session.slot] = stored.position, self.clock()
        session.applied = None
        if stored.asked:
            y = None
            if stored.y:
                y = np.frombuffer(stored.y, "<f4").reshape(-1, *session.model.output_shape)
            before = _unpacked(arena, stored.before) if stored.before else None
            session.applied = Applied(Request(stored.asked_at, stored.asked), stored.reached, y, before)
        self._revisions[session] = stored.revision

    def _forget(self, session: Session) -> None:
        """Frees a session's slot; the store has it still, or knows what became of it."""
        self._revisions.pop(session, None)
        self._indexed.pop(session, None)
        self.release(session)

    async def _commit(self, engine: Engine, moved: list[tuple[Advance, Array]]) -> None:
        """Writes what a tick has come to, in one round trip; notes with each advance why rows were refused."""
        sessions, places, writes, revisions = [], [], [], []
        arena = engine.arena
        for advance, y in moved:
            for row, slot in enumerate(advance.homes.tolist()):
                if row in (advance.problems or ()):
                    continue
                session = self.by_slot[engine][slot]
                position = session.position + advance.position
                revision = new_revision()
                fields: dict[str, bytes | str | int] = {"position": position, "revision": revision}
                fields["states"] = _packed(arena, arena.read(slot))
                if advance.requests is not None:
                    request = advance.requests[row]
                    before = None if advance.before is None else advance.before[row]
                    fields |= {"asked": request.digest, "asked_at": request.position, "reached": position}
                    fields["y"] = b"" if before else y[row].astype("<f4").tobytes()
                    fields["before"] = _packed(arena, before) if before else b""
                key, seen = key_of(session.owner, session.id), self._revisions.pop(session, b"")
                sessions.append(session)
                places.append((advance, row))
                revisions.append(revision)
                writes.append(Write(key, session.position, seen, fields))
        try:
            outcomes: Sequence[str | Problem] = await self._store.write(writes)
        except StoreAway as away:
            outcomes = [away] * len(writes)
        for session, revision, (advance, row), outcome in zip(sessions, revisions, places, outcomes, strict=True):
            if outcome == "written":
                self._revisions[session] = revision
            else:
                # Its slot holds what was not written: without a revision it is read again before anything else.
                advance.problems = (advance.problems or {}) | {
                    row: outcome if isinstance(outcome, Problem) else Stale()
                }
        await self._keep_indexed([session for session in sessions if session in self._revisions])

    async def _written(
        self, session: Session, position: int, revision: bytes, fields: dict[str, bytes | str | int]
    ) -> Problem | None:
        fields |= {"position": position, "revision": revision}
        seen = self._revisions.pop(session, b"")
        try:
            (outcome,) = await self._store.write(
                [Write(key_of(session.owner, session.id), session.position, seen, fields)]
            )
        except StoreAway as away:
            return away
        return None if outcome == "written" else Stale()

    async def _keep_indexed(self, sessions: list[Session]) -> None:
        now, share = time.monotonic(), _INDEX_SHARE * self.idle_seconds
        late = [one for one in sessions if now - self._indexed.get(one, -np.inf) > share]
        if late:
            self._indexed |= dict.fromkeys(late, now)
            try:
                await self._store.used([key_of(one.owner, one.id) for one in late])
            except StoreAway:
                for one in late:
                    self._indexed.pop(one, None)

    def _fate(self, found: Stored | Fate | None) -> Problem:
        return gone(found.reason, found.position) if isinstance(found, Fate) else unknown()

    def missing(self, owner: str, session_id: str) -> Problem:
        """Gives what to raise where a session has no slot here any more: it may be in the store."""
        return Stale()


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
