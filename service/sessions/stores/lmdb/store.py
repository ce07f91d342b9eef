"""The LMDB store: the sessions of a folder, whose slots are compared with the map before they are used."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.work import Finished
from cellserve.service.errors import SessionUnreadable, StaleSession
from cellserve.service.idempotency import IdempotencyKey
from cellserve.service.sessions.session import Session, key_of
from cellserve.service.sessions.stores.lmdb.store_client import LARGE_BYTES, LmdbClient
from cellserve.service.sessions.stores.protocol import StoreFiles
from cellserve.service.sessions.stores.records import SessionRecord, TombstoneRecord, UnreadableRecord
from cellserve.service.sessions.stores.shared import SharedStore
from cellserve.service.sessions.stores.tick import Tick


class LmdbStore(SharedStore):
    """The sessions of a folder; a `SessionStore`."""

    _client: LmdbClient

    def get(self, owner: str, session_id: str) -> Session:
        """Returns a session, from its slot or from the map."""
        session = self.table.live.get(key_of(owner, session_id))
        if session is not None:
            return session
        found = self._find(key_of(owner, session_id))
        if not isinstance(found, SessionRecord):
            raise self._tombstone_error(found)
        engine = self._cache.engine_here(found)
        if engine is None:
            raise StaleSession()  # its model must be loaded first
        return self._cache.add(owner, session_id, found, engine)

    def is_current(self, session: Session, key: IdempotencyKey | None) -> bool:
        """Returns whether a change may start from the slot, after filling it again if the session was changed."""
        if self._client.folder.alone:
            return session.stamp is not None
        stored = session.key
        stamp = self._client.stamp(stored)
        if stamp is not None and stamp == session.stamp:
            return True
        if session.engine.arena.locked[session.slot]:
            return False
        try:
            found = self._find(stored)
            if not isinstance(found, SessionRecord) or found.digest != session.model.digest:
                return False
            content = self._cache.content(session.engine, found)
        except SessionUnreadable:
            return False  # its refresh says so
        self._cache.fill(session, found, *content)
        return True

    def files(self) -> StoreFiles:
        """Returns what the store has on this machine's disk."""
        return self._client.files()

    def _find(self, key: str) -> SessionRecord | TombstoneRecord | None:
        """Reads a session or its tombstone as they are; raises SessionUnreadable."""
        try:
            return self._client.find(key).record
        except UnreadableRecord as error:
            raise self._cache.refused(error) from None

    def all_current(self, sessions: Sequence[Session]) -> bool:
        """Returns whether `is_current` holds for all of these sessions."""
        if self._client.folder.alone:
            return super().all_current(sessions)
        stamps = self._client.stamps([session.key for session in sessions])
        if all([stamp and stamp == one.stamp for stamp, one in zip(stamps, sessions, strict=True)]):  # noqa: C419
            return True  # faster than one by one
        return all([self.is_current(session, None) for session in sessions])  # noqa: C419  # fills all of them

    async def refresh(self, session: Session, key: IdempotencyKey | None) -> None:
        """Reads a locked session again if it was changed elsewhere."""
        if not self.is_current(session, key):
            await self._reload(session)

    def commit(self, engine: Engine, batch: Sequence[Finished]) -> Awaitable[None] | None:
        """Writes the results of a tick, at once if that takes microseconds; records the rows that are refused."""
        tick = Tick(engine, batch, self.table.by_slot[engine])
        states = len(tick.sessions) * engine.arena.row_bytes
        if self._client.folder.sync or states > LARGE_BYTES or engine.tracing is not None:
            return self._commit(tick)
        start = time.perf_counter()
        complete = tick.settle(self._client.write_now(tick.writes))
        engine.counts.store.observe(time.perf_counter() - start)
        return None if complete else _nothing()

    def sweep(self) -> None:
        """Evicts idle sessions from the cache, and expires those that nobody uses."""
        super().sweep()
        self._client.keep_house()


async def _nothing() -> None:
    """Is awaited by the engine, which then looks at each row's errors."""
