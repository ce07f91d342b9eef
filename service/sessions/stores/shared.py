"""Sessions in a store that several processes share: the slots are a cache, and every commit detects a stale one."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.work import Finished
from cellserve.service.errors import (
    Problem,
    SessionExists,
    SessionWentBack,
    StaleSession,
    StoreUnavailable,
)
from cellserve.service.idempotency import AppliedChange, IdempotencyKey, resolve
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
    NO_STAMP,
    ConditionalWrites,
    SessionRecord,
    StoredAnswer,
    TombstoneRecord,
    UnreadableRecord,
    VersionStamp,
    WriteOutcome,
    encoded_answer,
    new_revision,
    new_stamps,
)
from cellserve.service.sessions.stores.slot_cache import LoadEngine, SlotCache
from cellserve.service.sessions.stores.state_bytes import pack_states
from cellserve.service.sessions.stores.tick import Tick
from cellserve.service.sessions.table import SessionTable
from cellserve.service.settings import WhenFull

_DEADLINE_SLACK = 0.1  # the deadline in the store's index is refreshed only after this fraction of the idle time


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
        self._client, self._client_limits = client, client_limits
        self._cache = SlotCache(table, cached, engine_loader)
        self.created = 0
        self.ended = dict.fromkeys(("deleted", "expired", "evicted"), 0)

    @property
    def unreadable(self) -> int:
        """Records that were read so far and were not those of a session."""
        return self._cache.unreadable

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
            session = await self._cached(owner, session_id, await self._load(key))
        return session

    async def _load(self, key: str) -> SessionRecord | TombstoneRecord | None:
        """Reads a session or its tombstone; raises SessionUnreadable, StoreUnavailable."""
        try:
            return await self._client.load(key)
        except UnreadableRecord as error:
            raise self._cache.refused(error) from None

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
            stored = await self._load(session.key)
            if not isinstance(stored, SessionRecord) or stored.digest != session.model.digest:
                raise self._tombstone_error(stored)
            content = self._cache.content(session.engine, stored)
        except StoreUnavailable:
            raise
        except Problem:
            self._cache.evict(session)
            raise
        self._cache.fill(session, stored, *content)

    def is_current(self, session: Session, key: IdempotencyKey | None) -> bool:
        """Returns whether a change may start from the slot; if the slot is stale after all, the commit detects it."""
        return session.stamp is not None and (key is None or key.position == session.position)

    def all_current(self, sessions: Sequence[Session]) -> bool:
        """Returns whether all slots hold a committed state."""
        return all([session.stamp is not None for session in sessions])  # noqa: C419  # faster than a generator

    async def refresh(self, session: Session, key: IdempotencyKey | None) -> None:
        """Reads a locked session again, unless a change with this key may start from its slot as it is."""
        if self.is_current(session, key):
            return
        known, seen = session.stamp is not None, session.position
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
            outcome = await self._making_room(owner, new, lambda room: self._client.create(key, new, room))
            self.created += outcome is WriteOutcome.WRITTEN
            found = new if outcome is WriteOutcome.WRITTEN else await self._load(key)
        session = await self._cached(owner, name, found)
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
        await self._making_room(owner, new, lambda room: self._client.replace(key, new, room))
        before = self.table.live.get(key)
        if before is not None:
            # Work in flight in the old session is refused when it is committed.
            with suppress(StaleSession):
                async with self._cache.locked(before):
                    self._cache.evict(before)
        return await self._cached(owner, session_id, new)

    async def fork(
        self, session: Session, new_id: str | None, creation_digest: bytes, position: int | None = None
    ) -> tuple[Session, bool]:
        """Creates a session with the state and position that another has in the store."""
        async with self._cache.locked(session):
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
                async with self._cache.locked(session):
                    self._cache.evict(session)
        if outcome is WriteOutcome.GONE:
            fate = await self._load(key)
            if not isinstance(fate, TombstoneRecord) or fate.reason != "deleted":
                raise self._tombstone_error(fate)

    async def page(self, owner: str, after: Page, limit: int) -> tuple[list[SessionSummary], Page | None]:
        """Returns a page of an owner's sessions; one that lives throughout, and can be read, is on exactly one page."""
        found, cursor = await self._client.page(owner, after[1], limit)
        for one in found:
            if isinstance(one, UnreadableRecord):
                self._cache.refused(one)
        listed = [one for one in found if isinstance(one, SessionSummary)]
        return listed, (0, cursor) if cursor else None

    async def read_state(self, session: Session) -> tuple[States, int]:
        """Returns a session's states and position in the store."""
        async with self._cache.locked(session):
            await self._reload(session)
            return session.engine.arena.read(session.slot), session.position

    async def write_state(
        self, session: Session, states: States | None, key: IdempotencyKey | None, moves: int, before: States | None
    ) -> None:
        """Writes a locked session's states."""
        position = session.position + moves
        applied, answer, specs = None, b"", session.engine.arena.specs
        if key is not None:
            applied = AppliedChange(key, position, None, before)
            kind, content = StoredAnswer.NOTHING, b""
            if before is not None:
                kind, content = StoredAnswer.BEFORE, pack_states(specs, before)
            answer = encoded_answer(key.digest, key.position, position, kind, content)
        (stamp,) = new_stamps([position])
        write = ConditionalWrites(
            [session.key], [session.stamp or NO_STAMP], [stamp], [pack_states(specs, states)], [answer]
        )
        session.stamp = None
        (outcome,) = await self._client.write(write)
        if isinstance(outcome, Problem):
            raise outcome
        if outcome is not WriteOutcome.WRITTEN:
            raise StaleSession()
        session.engine.arena.write(session.slot, states)
        session.engine.arena.position[session.slot] = position
        session.applied, session.stamp = applied, stamp

    def sweep(self) -> None:
        """Evicts idle sessions from the cache; the store itself expires those that nobody uses."""
        for session in list(self.table.idle()):
            self._cache.evict(session)

    async def _making_room(
        self, owner: str, new: SessionRecord, create: Callable[[Room], Awaitable[WriteOutcome]]
    ) -> WriteOutcome:
        """Returns the outcome of a new session's creation; at a limit on sessions, evicts others if configured.

        Raises:
            ServerFull: The limit is reached.
        """
        room = Room(self.max_sessions, current_client(owner), self._client_limits)
        evicts = self.when_full == "evict" and len(new.states) <= room.client_limits.state_bytes
        emptied = False
        while (outcome := await create(room)) in (WriteOutcome.FULL, WriteOutcome.CROWDED):
            whose = room.client if outcome is WriteOutcome.CROWDED else None
            longest = await self._client.longest_idle(whose) if evicts else None
            if longest is None and evicts and not emptied:
                emptied = True  # the sessions that took the room have just ended
                continue
            if longest is None and whose is not None:
                raise room.client_limits.error()
            if longest is None:
                raise capacity_error(self.max_sessions, self.table.idle_seconds)
            if await self._client.end(longest, "evicted") is WriteOutcome.WRITTEN:
                self.ended["evicted"] += 1
            session = self.table.live.get(longest)
            if session is not None and not session.engine.arena.locked[session.slot]:
                self._cache.evict(session)
        return outcome

    async def _cached(self, owner: str, session_id: str, stored: SessionRecord | TombstoneRecord | None) -> Session:
        """Returns a session that the store has, from its slot, or after giving it one."""
        if not isinstance(stored, SessionRecord):
            raise self._tombstone_error(stored)
        engine = await self._cache.engine_of(stored)
        known = self.table.live.get(key_of(owner, session_id))
        return self._cache.add(owner, session_id, stored, engine) if known is None else known

    def commit(self, engine: Engine, batch: Sequence[Finished]) -> Awaitable[None] | None:
        """Writes the results of a tick in one round trip; records the rows that are refused in their items."""
        return self._commit(Tick(engine, batch, self.table.by_slot[engine]))

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
            return await self._client.write(tick.writes, [session.key for session in late])
        except StoreUnavailable:
            for session in late:
                session.deadline_indexed_at = -math.inf
            raise

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


def _new_record(engine: Engine, states: States | None, creation_digest: bytes, position: int = 0) -> SessionRecord:
    """Builds the record of a new session."""
    model, stamp = engine.model, VersionStamp(position, new_revision())
    return SessionRecord(
        model.name, model.version, model.digest, creation_digest, stamp, pack_states(engine.arena.specs, states)
    )


def _went_back(session: Session, seen: int) -> SessionWentBack:
    return SessionWentBack(
        f"the session was at position {seen}, but is at {session.position} in the store, which has lost acknowledged "
        f"changes (a failover, a restart without its file): send the steps from {session.position} again",
        position=session.position,
    )
