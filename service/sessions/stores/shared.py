"""Sessions in a store that several processes share: the slots are a cache, and every commit detects a stale one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.state_arena import Arena
from cellserve.service.engine.work import Finished, WorkItem
from cellserve.service.errors import (
    ModelVersionNotHere,
    Problem,
    ServerFull,
    SessionExists,
    SessionUnreadable,
    SessionWentBack,
    StaleSession,
    StoreUnavailable,
)
from cellserve.service.idempotency import AppliedChange, IdempotencyKey, resolve
from cellserve.service.model_repository.model import VersionKey
from cellserve.service.sessions.session import (
    NO_LIMITS,
    ClientLimits,
    Durable,
    Room,
    Session,
    SessionSummary,
    current_client,
    key_of,
    session_gone_error,
    unknown_session_error,
)
from cellserve.service.sessions.stores.memory import capacity_error, new_id
from cellserve.service.sessions.stores.protocol import Page, States, StoreClient, StoreFiles
from cellserve.service.sessions.stores.records import (
    ConditionalWrite,
    SessionRecord,
    StoredAnswer,
    TombstoneRecord,
    UnreadableRecord,
    VersionStamp,
    WriteOutcome,
    new_revisions,
)
from cellserve.service.sessions.stores.state_bytes import pack_states, unpack_states
from cellserve.service.sessions.table import SessionTable
from cellserve.service.settings import WhenFull

Array = NDArray[Any]
LoadEngine = Callable[[VersionKey, str], Awaitable[Engine | None]]

_DEADLINE_SLACK = 0.1  # the deadline in the store's index is refreshed only after this fraction of the idle time

log = logging.getLogger("cellserve")


@dataclass(slots=True)
class Tick:
    """A tick's results on their way to the store."""

    sessions: list[Session]
    rows: list[tuple[WorkItem, int]]
    writes: list[ConditionalWrite]

    def settle(self, outcomes: Sequence[WriteOutcome | Problem]) -> bool:
        """Makes the slots that were written current, and records the others in their items; returns if all were."""
        complete = True
        for session, (item, row), write, outcome in zip(self.sessions, self.rows, self.writes, outcomes, strict=True):
            if outcome is WriteOutcome.WRITTEN:
                session.revision = write.stamp.revision
            else:
                problem = outcome if isinstance(outcome, Problem) else StaleSession()
                item.errors_by_row = (item.errors_by_row or {}) | {row: problem}
                complete = False
        return complete


class SharedStore:
    """The sessions of a shared store; those in use here are cached in slots. A `SessionStore`.

    Args:
        client: The store itself.
        table: The slots.
        cached: Sessions of a model that are cached here, at most.
        max_sessions: Live sessions, at most.
        when_full: Refuse a new session, or evict the longest idle one.
        engine_loader: Returns the engine of a model version by name and digest, loading it if necessary.
        client_limits: What the sessions of one client may amount to.
    """

    def __init__(
        self,
        client: StoreClient,
        table: SessionTable,
        cached: int,
        max_sessions: int,
        when_full: WhenFull = "refuse",
        engine_loader: LoadEngine | None = None,
        client_limits: ClientLimits = NO_LIMITS,
    ) -> None:
        self.table, self.max_sessions, self.when_full = table, max_sessions, when_full
        self.durable: Durable = client.durable
        self._client, self._cache_size, self._engine_loader = client, cached, engine_loader
        self._client_limits = client_limits
        self.created = 0
        self.ended = dict.fromkeys(("deleted", "expired", "evicted"), 0)
        self.unreadable = 0
        self._logged: set[str] = set()  # what has been said of unreadable records; there are few such messages

    @property
    def errors(self) -> Mapping[str, int]:
        """Calls that failed so far, by reason."""
        return self._client.errors

    def files(self) -> StoreFiles | None:
        """Returns None: what the store has is not on this machine's disk."""
        return None

    async def start(self) -> None:
        """Checks the store; if it is unavailable now, later calls try again."""
        with suppress(StoreUnavailable):
            await self._client.start()

    async def leave_to_workers(self) -> None:
        """Closes what worker processes open for themselves."""
        await self._client.leave_to_workers()

    async def close(self) -> None:
        """Closes the store."""
        await self._client.close()

    async def count(self) -> int:
        """Returns the number of sessions in the store; raises StoreUnavailable."""
        live, expired = await self._client.count()
        self.ended["expired"] += expired
        return live

    def get(self, owner: str, session_id: str) -> Session:
        """Returns a session that has a slot here."""
        session = self.table.live.get(key_of(owner, session_id))
        if session is None:
            raise self.not_found_error(owner, session_id)
        return session

    async def fetch(self, owner: str, session_id: str) -> Session:
        """Returns a session, from its slot or from the store."""
        key = key_of(owner, session_id)
        session = self.table.live.get(key)
        if session is None:
            session = await self._cache_record(owner, session_id, await self._load(key))
        return session

    async def _load(self, key: str) -> SessionRecord | TombstoneRecord | None:
        """Reads a session or its tombstone; raises SessionUnreadable, StoreUnavailable."""
        try:
            return await self._client.load(key)
        except UnreadableRecord as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: UnreadableRecord) -> SessionUnreadable:
        """Counts a record that is not a session's, logs it unless one like it was logged, and returns the problem."""
        self.unreadable += 1
        if str(error) not in self._logged:
            self._logged.add(str(error))
            log.error("the store has something under a session's name that is not a session: %s", error)
        return SessionUnreadable()

    def not_found_error(self, owner: str, session_id: str) -> Problem:
        """Returns the error for a session without a slot: the store may still have it."""
        return StaleSession()

    async def _reload(self, session: Session) -> None:
        """Reads a locked session again.

        Raises:
            SessionGone, UnknownSession, StaleSession: The session is not in the store any more.
            StoreUnavailable: The store does not answer.
        """
        try:
            stored = await self._load(key_of(session.owner, session.id))
            if not isinstance(stored, SessionRecord) or stored.digest != session.model.digest:
                raise self._tombstone_error(stored)
            content = self._content(session.engine, stored)
        except StoreUnavailable:
            raise
        except Problem:
            self._evict_from_cache(session)
            raise
        self._fill(session, stored, *content)

    def is_current(self, session: Session, key: IdempotencyKey | None) -> bool:
        """Returns whether a change may start from the slot; if the slot is stale after all, the commit detects it."""
        return session.revision is not None and (key is None or key.position == session.position)

    def all_current(self, sessions: Sequence[Session]) -> bool:
        """Returns whether all slots hold a committed state."""
        return all(session.revision is not None for session in sessions)

    async def refresh(self, session: Session, key: IdempotencyKey | None) -> None:
        """Reads a locked session again, unless a change with this key may start from its slot as it is."""
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
        creation_digest: bytes,
        position: int = 0,
    ) -> tuple[Session, bool]:
        """Creates a session in the store, and caches it."""
        name = session_id if session_id is not None else new_id()
        key = key_of(owner, name)
        found = None if session_id is None else await self._load(key)
        outcome = WriteOutcome.EXISTS
        if found is None:
            new = _new_record(engine, states, creation_digest, position)
            outcome = await self._making_room(owner, lambda room: self._client.create(key, new, room))
            self.created += outcome is WriteOutcome.WRITTEN
            found = new if outcome is WriteOutcome.WRITTEN else await self._load(key)
        session = await self._cache_record(owner, name, found)
        if session.creation_digest != creation_digest:
            raise SessionExists(
                f"session {name!r} exists already; another request created it: choose another id",
                position=session.position,
            )
        return session, outcome is WriteOutcome.WRITTEN

    async def recreate(self, engine: Engine, owner: str, session_id: str, creation_digest: bytes) -> Session:
        """Creates a session from zeros in the store, replacing any existing or ended one of that id."""
        key = key_of(owner, session_id)
        new = _new_record(engine, None, creation_digest)
        await self._making_room(owner, lambda room: self._client.replace(key, new, room))
        before = self.table.live.get(key)
        if before is not None:
            # Work in flight in the old session is refused when it is committed.
            with suppress(StaleSession):
                async with self._locked(before):
                    self._evict_from_cache(before)
        return await self._cache_record(owner, session_id, new)

    async def fork(
        self, session: Session, new_id: str | None, creation_digest: bytes, position: int | None = None
    ) -> tuple[Session, bool]:
        """Creates a session with the state and position that another has in the store."""
        async with self._locked(session):
            await self._reload(session)
            known = None if new_id is None else await self._load(key_of(session.owner, new_id))
            if position is not None and known is None:
                resolve(session.position, None, IdempotencyKey(position, b""))
            states = session.engine.arena.read(session.slot)
            return await self.create(session.engine, states, session.owner, new_id, creation_digest, session.position)

    async def delete(self, owner: str, session_id: str, position: int | None = None) -> None:
        """Deletes a session; a repeated call changes nothing."""
        key = key_of(owner, session_id)
        outcome = await self._client.end(key, "deleted", position)
        self.ended["deleted"] += outcome is WriteOutcome.WRITTEN
        session = self.table.live.get(key)
        if outcome is WriteOutcome.CONFLICT:
            found = await self._load(key)
            if isinstance(found, SessionRecord) and position is not None:
                resolve(found.stamp.position, None, IdempotencyKey(position, b""))
            raise self._tombstone_error(found)
        if session is not None:
            with suppress(StaleSession):  # another change has found it gone and evicted it
                async with self._locked(session):
                    self._evict_from_cache(session)
        if outcome is WriteOutcome.GONE:
            fate = await self._load(key)
            if not isinstance(fate, TombstoneRecord) or fate.reason != "deleted":
                raise self._tombstone_error(fate)

    async def page(self, owner: str, after: Page, limit: int) -> tuple[list[SessionSummary], Page | None]:
        """Returns a page of an owner's sessions; one that lives throughout, and can be read, is on exactly one page."""
        found, cursor = await self._client.page(owner, after[1], limit)
        for one in found:
            if isinstance(one, UnreadableRecord):
                self._unreadable(one)
        listed = [one for one in found if isinstance(one, SessionSummary)]
        return listed, (0, cursor) if cursor else None

    async def read_state(self, session: Session) -> tuple[States, int]:
        """Returns a session's states and position in the store."""
        async with self._locked(session):
            await self._reload(session)
            return session.engine.arena.read(session.slot), session.position

    async def write_state(
        self, session: Session, states: States | None, key: IdempotencyKey | None, moves: int, before: States | None
    ) -> None:
        """Writes a locked session's states."""
        position = session.position + moves
        applied = last = None
        if key is not None:
            applied = AppliedChange(key, position, None, before)
            content = (
                (StoredAnswer.NOTHING,)
                if before is None
                else (StoredAnswer.BEFORE, pack_states(session.engine.arena.specs, before))
            )
            last = StoredAnswer(key.digest, key.position, position, *content)
        write = ConditionalWrite(
            key_of(session.owner, session.id),
            VersionStamp(session.position, session.revision or b""),
            VersionStamp(position, *new_revisions(1)),
            pack_states(session.engine.arena.specs, states),
            last,
        )
        session.revision = None
        (outcome,) = await self._client.write([write])
        if isinstance(outcome, Problem):
            raise outcome
        if outcome is not WriteOutcome.WRITTEN:
            raise StaleSession()
        session.engine.arena.write(session.slot, states)
        session.engine.arena.position[session.slot] = position
        session.applied, session.revision = applied, write.stamp.revision

    def sweep(self) -> None:
        """Evicts idle sessions from the cache; the store itself expires those that nobody uses."""
        for session in list(self.table.idle()):
            self._evict_from_cache(session)

    @asynccontextmanager
    async def _locked(self, session: Session) -> AsyncIterator[Session]:
        """Holds the lock of a cached session; raises StaleSession if it is not cached any more."""
        if not session.alive:
            raise StaleSession()
        async with self.table.locks[session.engine].locked(session):
            if not session.alive:
                raise StaleSession()
            try:
                yield session
            finally:
                if session.alive:
                    self.table.touch(session)

    async def _making_room(self, owner: str, create: Callable[[Room], Awaitable[WriteOutcome]]) -> WriteOutcome:
        """Returns the outcome of a creation; at a limit on sessions, evicts others if configured.

        Raises:
            ServerFull: The limit is reached.
        """
        room = Room(self.max_sessions, current_client(owner), self._client_limits)
        while (outcome := await create(room)) in (WriteOutcome.FULL, WriteOutcome.CROWDED):
            whose = room.client if outcome is WriteOutcome.CROWDED else None
            longest = await self._client.longest_idle(whose) if self.when_full == "evict" else None
            if longest is None and whose is not None:
                raise room.client_limits.error()
            if longest is None:
                raise capacity_error(self.max_sessions, self.table.idle_seconds)
            if await self._client.end(longest, "evicted") is WriteOutcome.WRITTEN:
                self.ended["evicted"] += 1
            session = self.table.live.get(longest)
            if session is not None and not session.engine.arena.locked[session.slot]:
                self._evict_from_cache(session)
        return outcome

    async def _cache_record(
        self, owner: str, session_id: str, stored: SessionRecord | TombstoneRecord | None
    ) -> Session:
        if not isinstance(stored, SessionRecord):
            raise self._tombstone_error(stored)
        engine = self._engine_here(stored)
        if engine is None and self._engine_loader is not None:
            engine = await self._engine_loader(VersionKey(stored.model, stored.version), stored.digest)
        if engine is None:
            raise ModelVersionNotHere(
                f"the session belongs to model {stored.model!r}, version {stored.version}, which this server does not "
                f"have (yet): try again in a few seconds, another server may have it"
            )
        known = self.table.live.get(key_of(owner, session_id))
        return self._cache(owner, session_id, stored, engine) if known is None else known

    def _engine_here(self, stored: SessionRecord) -> Engine | None:
        """Returns the engine of a session's model, if it is loaded."""
        return next((engine for engine in self.table.by_slot if engine.model.digest == stored.digest), None)

    def _cache(self, owner: str, session_id: str, stored: SessionRecord, engine: Engine) -> Session:
        """Gives a session a slot."""
        content = self._content(engine, stored)
        slot = self._slot(engine)
        session = self.table.add(Session(owner, session_id, engine, slot, np.array((slot,)), stored.creation_digest))
        self._fill(session, stored, *content)
        return session

    def _slot(self, engine: Engine) -> int:
        """Allocates a slot; if all are in use, evicts the session that was not used here for the longest time."""
        arena = engine.arena
        slot = arena.allocate() if len(self.table.by_slot[engine]) < self._cache_size else None
        if slot is None:
            oldest = self.table.longest_idle(engine)
            if oldest is None:
                raise ServerFull("all sessions that this server has room for have work in flight: try again")
            self._evict_from_cache(oldest)
            slot = arena.allocate()
        assert slot is not None
        return slot

    def _content(self, engine: Engine, stored: SessionRecord) -> tuple[States, AppliedChange | None]:
        """Decodes a record's states and last change; raises SessionUnreadable if they do not fit the model."""
        last, outputs, y, before = stored.last, engine.model.outputs, None, None
        try:
            states = unpack_states(engine.arena.specs, stored.states)
            if last is None:
                return states, None
            if last.kind == StoredAnswer.ANSWER:
                y = np.frombuffer(last.content, outputs.dtype).reshape(-1, *outputs.shape)
            elif last.kind == StoredAnswer.BEFORE:
                before = unpack_states(engine.arena.specs, last.content)
        except ValueError:
            raise self._unreadable(UnreadableRecord("its states or last answer do not fit its model")) from None
        return states, AppliedChange(IdempotencyKey(last.position, last.digest), last.position_after, y, before)

    def _fill(self, session: Session, stored: SessionRecord, states: States, applied: AppliedChange | None) -> None:
        arena = session.engine.arena
        arena.write(session.slot, states)
        arena.position[session.slot], arena.last_used[session.slot] = stored.stamp.position, self.table.clock()
        session.applied, session.revision = applied, stored.stamp.revision

    def _evict_from_cache(self, session: Session) -> None:
        """Frees a session's slot; the store still has the session or its tombstone."""
        session.revision = None
        self.table.remove(session)

    def commit(self, engine: Engine, batch: Sequence[Finished]) -> Awaitable[None] | None:
        """Writes the results of a tick in one round trip; records the rows that are refused in their items."""
        return self._commit(self._tick(engine, batch))

    async def _commit(self, tick: Tick) -> None:
        outcomes: Sequence[WriteOutcome | Problem]
        try:
            outcomes = await self._write(tick)
        except StoreUnavailable as away:
            outcomes = [away] * len(tick.writes)
        tick.settle(outcomes)

    async def _write(self, tick: Tick) -> Sequence[WriteOutcome | Problem]:
        late = self._overdue(tick.sessions)
        try:
            return await self._client.write(tick.writes, [key_of(one.owner, one.id) for one in late])
        except StoreUnavailable:
            for session in late:
                session.deadline_indexed_at = -math.inf
            raise

    def _tick(self, engine: Engine, batch: Sequence[Finished]) -> Tick:
        """Builds the writes of a tick's results; until it is settled, its slots must be read again before their use."""
        places = [
            (item, row, y)
            for item, y in batch
            for row in range(item.rows)
            if not item.errors_by_row or row not in item.errors_by_row
        ]
        slots = np.array([item.target_slots[row] for item, row, _ in places], np.intp)
        of_slot = self.table.by_slot[engine]
        sessions = [of_slot[slot] for slot in slots.tolist()]
        expected = [VersionStamp(session.position, session.revision or b"") for session in sessions]
        for session in sessions:
            session.revision = None  # the slot holds an uncommitted state: if the write fails, it must be read again
        arena = engine.arena
        positions = (arena.position[slots] + [item.x.shape[1] for item, _, _ in places]).tolist()
        stamps = list(map(VersionStamp, positions, new_revisions(len(places))))
        lasts = [_stored_answer(arena, *place, stamp) for place, stamp in zip(places, stamps, strict=True)]
        keys = [key_of(session.owner, session.id) for session in sessions]
        writes = list(map(ConditionalWrite, keys, expected, stamps, arena.pack(slots), lasts))
        return Tick(sessions, [(item, row) for item, row, _ in places], writes)

    def _overdue(self, sessions: list[Session]) -> list[Session]:
        """Returns the sessions whose deadline in the index is to be refreshed, and records the refresh."""
        now = time.monotonic()
        before = now - _DEADLINE_SLACK * self.table.idle_seconds
        late = [session for session in sessions if session.deadline_indexed_at < before]
        for session in late:
            session.deadline_indexed_at = now
        return late

    def _tombstone_error(self, found: SessionRecord | TombstoneRecord | None) -> Problem:
        if isinstance(found, SessionRecord):
            return StaleSession()  # another session of that id, or one of another model version
        return unknown_session_error() if found is None else session_gone_error(found.reason, found.position)


def _stored_answer(arena: Arena, item: WorkItem, row: int, y: Array, stamp: VersionStamp) -> StoredAnswer | None:
    """Builds what is stored to answer a repetition of a row's step."""
    if item.idempotency_keys is None:
        return None
    key = item.idempotency_keys[row]
    change = key.digest, key.position, stamp.position
    if item.states_before is not None:
        return StoredAnswer(*change, StoredAnswer.BEFORE, pack_states(arena.specs, item.states_before[row]))
    return StoredAnswer(*change, StoredAnswer.ANSWER, y[row].tobytes())


def _new_record(engine: Engine, states: States | None, creation_digest: bytes, position: int = 0) -> SessionRecord:
    """Builds the record of a new session."""
    model, stamp = engine.model, VersionStamp(position, *new_revisions(1))
    return SessionRecord(
        model.name, model.version, model.digest, creation_digest, stamp, pack_states(engine.arena.specs, states)
    )


def _went_back(session: Session, seen: int) -> SessionWentBack:
    return SessionWentBack(
        f"the session was at position {seen}, but is at {session.position} in the store, which has lost acknowledged "
        f"changes (a failover, a restart without its file): send the steps from {session.position} again",
        position=session.position,
    )
