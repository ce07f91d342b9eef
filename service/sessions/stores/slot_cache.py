"""The slots of this process as a cache of the sessions in a shared store."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.errors import ModelVersionNotHere, ServerFull, SessionUnreadable, StaleSession
from cellserve.service.idempotency import AppliedChange, IdempotencyKey
from cellserve.service.model_repository.model import VersionKey
from cellserve.service.sessions.session import Session
from cellserve.service.sessions.stores.records import SessionRecord, StoredAnswer, UnreadableRecord
from cellserve.service.sessions.stores.state_bytes import unpack_states
from cellserve.service.sessions.table import SessionTable

Array = NDArray[Any]
Content = tuple[dict[str, Array], AppliedChange | None]  # a session's states and last change
LoadEngine = Callable[[VersionKey, str], Awaitable[Engine | None]]

log = logging.getLogger("cellserve")


class SlotCache:
    """The sessions of a shared store that have a slot here.

    Args:
        table: The slots.
        size: Sessions of a model that are cached, at most.
        load_engine: Returns the engine of a model version by name and digest, loading it if necessary.
    """

    def __init__(self, table: SessionTable, size: int, load_engine: LoadEngine | None) -> None:
        self.table, self._size, self._load_engine = table, size, load_engine
        self.unreadable = 0  # records that were not those of a session
        self._logged: set[str] = set()  # what has been said of them; there are few such messages

    def refused(self, error: UnreadableRecord) -> SessionUnreadable:
        """Counts a record that is not a session's, logs it unless one like it was logged, and returns the problem."""
        self.unreadable += 1
        if str(error) not in self._logged:
            self._logged.add(str(error))
            log.error("the store has something under a session's name that is not a session: %s", error)
        return SessionUnreadable()

    def engine_here(self, stored: SessionRecord) -> Engine | None:
        """Returns the engine of a session's model, if it is loaded."""
        return next((engine for engine in self.table.by_slot if engine.model.digest == stored.digest), None)

    async def engine_of(self, stored: SessionRecord) -> Engine:
        """Returns the engine of a session's model, after loading it if necessary; raises ModelVersionNotHere."""
        engine = self.engine_here(stored)
        if engine is None and self._load_engine is not None:
            engine = await self._load_engine(VersionKey(stored.model, stored.version), stored.digest)
        if engine is None:
            raise ModelVersionNotHere(
                f"the session belongs to model {stored.model!r}, version {stored.version}, which this server does not "
                f"have (yet): try again in a few seconds, another server may have it"
            )
        return engine

    def add(self, owner: str, session_id: str, stored: SessionRecord, engine: Engine) -> Session:
        """Gives a session a slot; raises SessionUnreadable, ServerFull."""
        content = self.content(engine, stored)
        slot = self._slot(engine)
        session = Session(
            owner, session_id, engine, slot, np.array((slot,)), stored.creation_digest, created_at=stored.created_at
        )
        self.table.add(session)
        self.fill(session, stored, *content)
        return session

    def content(self, engine: Engine, stored: SessionRecord) -> Content:
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
            raise self.refused(UnreadableRecord("its states or last answer do not fit its model")) from None
        return states, AppliedChange(IdempotencyKey(last.position, last.digest), last.position_after, y, before)

    def fill(
        self, session: Session, stored: SessionRecord, states: dict[str, Array], applied: AppliedChange | None
    ) -> None:
        """Writes a session's record, and the `content` of that, to its slot."""
        arena = session.engine.arena
        arena.write(session.slot, states)
        arena.position[session.slot], arena.last_used[session.slot] = stored.stamp.position, self.table.clock()
        session.applied, session.stamp = applied, stored.stamp.packed
        session.created_at = stored.created_at  # it may be another session of that id

    def evict(self, session: Session) -> None:
        """Frees a session's slot; the store still has the session or its tombstone."""
        session.stamp = None
        self.table.remove(session)

    @asynccontextmanager
    async def locked(self, session: Session) -> AsyncIterator[Session]:
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

    def _slot(self, engine: Engine) -> int:
        """Allocates a slot; if all are in use, evicts the session that was not used here for the longest time."""
        arena = engine.arena
        slot = arena.allocate() if len(self.table.by_slot[engine]) < self._size else None
        if slot is None:
            oldest = self.table.longest_idle(engine)
            if oldest is None:
                raise ServerFull("all sessions that this server has room for have work in flight: try again")
            self.evict(oldest)
            slot = arena.allocate()
        assert slot is not None
        return slot
