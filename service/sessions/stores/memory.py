"""Sessions in this process's memory: the slots are the store itself."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.work import Finished
from cellserve.service.errors import (
    ModelVersionNotHere,
    Problem,
    ServerFull,
    SessionExists,
    SessionGone,
    UnknownSession,
)
from cellserve.service.idempotency import AppliedChange, IdempotencyKey, resolve
from cellserve.service.sessions.session import (
    NO_LIMITS,
    ClientLimits,
    Durable,
    Session,
    SessionSummary,
    current_client,
    key_of,
    session_gone_error,
    unknown_session_error,
)
from cellserve.service.sessions.stores.protocol import Page, States
from cellserve.service.sessions.table import ClientSessions, SessionTable
from cellserve.service.settings import WhenFull


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is remembered of a session that has ended."""

    reason: str
    position: int
    until: float  # when it is forgotten, in seconds of the table's clock


def new_id() -> str:
    """Returns a new session id: 128 random bits."""
    return secrets.token_hex(16)


def capacity_error(max_sessions: int, idle_seconds: float) -> ServerFull:
    """Builds the error for a full store."""
    return ServerFull(
        f"the limit of {max_sessions} live sessions is reached: delete some, or try again when one has been idle for "
        f"{idle_seconds:g} seconds"
    )


class MemoryStore:
    """The sessions of one process; a `SessionStore`.

    Args:
        table: The slots.
        max_sessions: Live sessions, at most.
        tombstone_seconds: How long ended sessions are answered 410 instead of 404.
        when_full: At a limit, refuse a new session, or evict the longest idle one.
        client_limits: What the sessions of one client may amount to.
    """

    def __init__(
        self,
        table: SessionTable,
        max_sessions: int,
        tombstone_seconds: float,
        when_full: WhenFull = "refuse",
        client_limits: ClientLimits = NO_LIMITS,
    ) -> None:
        self.table = table
        self.durable: Durable = "none"
        self.max_sessions, self.when_full = max_sessions, when_full
        self._tombstone_seconds, self._client_limits = tombstone_seconds, client_limits
        self.tombstones: OrderedDict[str, Tombstone] = OrderedDict()  # oldest first
        self.created = 0
        self.ended = dict.fromkeys(("deleted", "expired", "evicted"), 0)
        self.unreadable = 0
        self.errors: dict[str, int] = {}  # memory does not fail

    def files(self) -> None:
        """Returns None: memory has no files."""
        return None

    async def start(self) -> None:
        """Has nothing to check."""

    async def leave_to_workers(self) -> None:
        """Has nothing to leave: each process has its own sessions."""

    async def close(self) -> None:
        """Has nothing to close."""

    async def count(self) -> int:
        """Returns the number of live sessions."""
        return len(self.table)

    def get(self, owner: str, session_id: str) -> Session:
        """Returns a live session; expiry is enforced by `sweep`, not here."""
        session = self.table.live.get(key_of(owner, session_id))
        if session is None:
            raise self.not_found_error(owner, session_id)
        return session

    async def fetch(self, owner: str, session_id: str) -> Session:
        """Returns a live session."""
        return self.get(owner, session_id)

    def not_found_error(self, owner: str, session_id: str) -> Problem:
        """Returns the error for a session that is not live."""
        tombstone = self.tombstones.get(key_of(owner, session_id))
        return (
            unknown_session_error() if tombstone is None else session_gone_error(tombstone.reason, tombstone.position)
        )

    def is_current(self, session: Session, key: IdempotencyKey | None) -> bool:
        """The slot is the session."""
        return True

    def all_current(self, sessions: Sequence[Session]) -> bool:
        """The slots are the sessions."""
        return True

    async def refresh(self, session: Session, key: IdempotencyKey | None) -> None:
        """The slot is the session."""

    def commit(self, engine: Engine, batch: Sequence[Finished]) -> Awaitable[None] | None:
        """Has nothing to write: the engine has updated the slots."""
        return None

    async def write_state(
        self, session: Session, states: States | None, key: IdempotencyKey | None, moves: int, before: States | None
    ) -> None:
        """Writes a locked session's states."""
        session.engine.arena.write(session.slot, states)
        session.engine.arena.position[session.slot] += moves
        if key is not None:
            session.applied = AppliedChange(key, session.position, None, before)

    async def read_state(self, session: Session) -> tuple[States, int]:
        """Returns a session's states and position."""
        self.table.touch(session)
        return session.engine.arena.read(session.slot), session.position

    async def create(
        self,
        engine: Engine,
        states: States | None,
        owner: str,
        session_id: str | None,
        creation_digest: bytes,
        position: int = 0,
    ) -> tuple[Session, bool]:
        """Creates a session from zeros or from given states."""
        return self.create_now(engine, states, owner, session_id, creation_digest, position)

    def create_now(
        self,
        engine: Engine,
        states: States | None = None,
        owner: str = "",
        session_id: str | None = None,
        creation_digest: bytes = b"",
        position: int = 0,
    ) -> tuple[Session, bool]:
        """Creates a session as `create` does, without waiting."""
        if session_id is not None:
            key = key_of(owner, session_id)
            known = self.table.live.get(key)
            if known is not None:
                if known.creation_digest != creation_digest:
                    raise SessionExists(
                        f"session {session_id!r} exists already; another request created it (of model "
                        f"{known.model.name!r}): choose another id, or repeat that request",
                        position=known.position,
                    )
                self.table.touch(known)
                return known, False
            if key in self.tombstones:
                raise self.not_found_error(owner, session_id)
        return self._make(engine, states, owner, session_id or new_id(), creation_digest, position), True

    async def recreate(self, engine: Engine, owner: str, session_id: str, creation_digest: bytes) -> Session:
        """Creates a session from zeros, replacing any existing or ended one of that id."""
        key = key_of(owner, session_id)
        while (before := self.table.live.get(key)) is not None:
            with suppress(SessionGone, UnknownSession):
                async with self._locked(before):
                    self._end(before, "deleted")
        if engine not in self.table.by_slot:  # it was unloaded while this waited for the lock
            raise ModelVersionNotHere(f"{engine.model.key} was just unloaded: send the request again")
        session = self._make(engine, None, owner, session_id, creation_digest)
        self.tombstones.pop(key, None)
        return session

    async def fork(
        self, session: Session, new_id: str | None, creation_digest: bytes, position: int | None = None
    ) -> tuple[Session, bool]:
        """Creates a session with the state and position of another."""
        if new_id is not None and key_of(session.owner, new_id) in self.table.live:
            # A repetition of the same request, or a conflict.
            return self.create_now(session.engine, None, session.owner, new_id, creation_digest)
        async with self._locked(session):
            if position is not None:
                resolve(session.position, None, IdempotencyKey(position, b""))
            states = session.engine.arena.read(session.slot)
            return self.create_now(session.engine, states, session.owner, new_id, creation_digest, session.position)

    async def delete(self, owner: str, session_id: str, position: int | None = None) -> None:
        """Deletes a session after the changes that came before."""
        tombstone = self.tombstones.get(key_of(owner, session_id))
        if tombstone is None or tombstone.reason != "deleted":
            async with self._locked(self.get(owner, session_id)) as session:
                if position is not None:
                    resolve(session.position, None, IdempotencyKey(position, b""))
                self._end(session, "deleted")

    async def page(self, owner: str, after: Page, limit: int) -> tuple[list[SessionSummary], Page | None]:
        """Returns a page of an owner's sessions; a session that lives throughout the listing is on exactly one page.

        The cursor is the number of the last session before the page.
        """
        own = self.table.of_owner.get(owner, {})
        rest = (session for number, session in own.items() if number > after[1])
        page = list(islice(rest, limit))
        found = [
            SessionSummary(one.id, one.model.name, one.model.version, one.position, one.created_at) for one in page
        ]
        return found, (0, page[-1].number) if next(rest, None) is not None else None

    def sweep(self) -> None:
        """Ends idle sessions, and forgets old tombstones."""
        for session in list(self.table.idle()):
            self._end(session, "expired")
        now = self.table.clock()
        while self.tombstones and next(iter(self.tombstones.values())).until <= now:
            self.tombstones.popitem(last=False)

    @asynccontextmanager
    async def _locked(self, session: Session) -> AsyncIterator[Session]:
        """Holds a session's lock; raises `not_found_error` if the session has ended."""
        if not session.alive:
            raise self.not_found_error(session.owner, session.id)
        async with self.table.locks[session.engine].locked(session):
            if not session.alive:
                raise self.not_found_error(session.owner, session.id)
            try:
                yield session
            finally:
                if session.alive:
                    self.table.touch(session)

    def _make(
        self,
        engine: Engine,
        states: States | None,
        owner: str,
        session_id: str,
        creation_digest: bytes,
        position: int = 0,
    ) -> Session:
        slot = self._allocate_slot(engine, current_client(owner))
        arena = engine.arena
        if states is not None:
            arena.write(slot, states)
        arena.position[slot], arena.last_used[slot] = position, self.table.clock()
        self.created += 1
        return self.table.add(Session(owner, session_id, engine, slot, np.array((slot,)), creation_digest))

    def _allocate_slot(self, engine: Engine, client: str) -> int:
        """Allocates a slot for a client's new session, making room by expiry and, if configured, by eviction."""
        for make_room in (None, self.sweep, partial(self._evict, engine, client)):
            if make_room is not None:
                make_room()
            crowded = self._is_crowded(engine, client)
            slot = engine.arena.allocate() if not crowded and len(self.table) < self.max_sessions else None
            if slot is not None:
                return slot
        if crowded:
            raise self._client_limits.error()
        raise capacity_error(self.max_sessions, self.table.idle_seconds)

    def _is_crowded(self, engine: Engine, client: str) -> bool:
        """Whether a client has as many sessions as it may have, or as much in their states."""
        own, limits = self.table.by_client.get(client), self._client_limits
        count, state_bytes = (0, 0) if own is None else (own.count, own.state_bytes)
        return count >= limits.sessions or state_bytes + engine.arena.row_bytes > limits.state_bytes

    def _evict(self, engine: Engine, client: str) -> None:
        """If configured, ends the longest idle session that is not locked; of a crowded client, as many as it takes."""
        if self.when_full != "evict" or engine.arena.row_bytes > self._client_limits.state_bytes:
            return
        if not self._is_crowded(engine, client):
            self._evict_longest_idle(None)
        while self._is_crowded(engine, client) and self._evict_longest_idle(self.table.by_client[client]):
            pass

    def _evict_longest_idle(self, own: ClientSessions | None) -> bool:
        """Ends the longest idle session that is not locked, of one client or any; returns whether there was one."""
        candidates = [session for one in self.table.by_slot if (session := self.table.longest_idle(one, own))]
        if candidates:
            self._end(min(candidates, key=lambda one: float(one.engine.arena.last_used[one.slot])), "evicted")
        return bool(candidates)

    def _end(self, session: Session, reason: str) -> None:
        """Ends a session that nobody else has locked; changes that wait for it find that it is gone."""
        self.ended[reason] += 1
        until = self.table.clock() + self._tombstone_seconds
        self.tombstones[session.key] = Tombstone(reason, session.position, until)
        self.table.remove(session)
