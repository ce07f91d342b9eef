"""Stores as places with sessions, read and written without a server: a folder of LMDB, a Redis."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cellserve.service.errors import Problem
from cellserve.service.sessions.session import NO_LIMITS, Durable, Room
from cellserve.service.sessions.stores.lmdb.folder import Folder, FolderInUse
from cellserve.service.sessions.stores.lmdb.reader import FolderReader
from cellserve.service.sessions.stores.lmdb.store_client import LmdbClient
from cellserve.service.sessions.stores.protocol import StoreClient, StoreUnusable
from cellserve.service.sessions.stores.records import (
    SessionRecord,
    TombstoneRecord,
    UnreadableRecord,
    VersionStamp,
    WriteOutcome,
    new_revision,
)
from cellserve.service.sessions.stores.state_bytes import unpack_states
from cellserve.service.settings import Settings
from cellserve.sessions.errors import NoSession, SessionFailed, SessionsError
from cellserve.sessions.models import Models
from cellserve.sessions.place import Found, Listed
from cellserve.sessions.session_file import SavedSession

T = TypeVar("T")


class Store:
    """A store as a place with sessions: what those of LMDB and Redis share.

    Args:
        name: What messages call it.
        models: The models of its sessions.
    """

    durable: Durable

    def __init__(self, name: str, models: Models) -> None:
        self.name, self._models = name, models
        self._runner = asyncio.Runner()
        self._opened: StoreClient | None = None

    def read(self, name: str) -> Found:
        """Reads a session without extending its life."""
        try:
            record, expires_in = self._find(name)
        except UnreadableRecord as error:
            raise SessionFailed(f"{name}: what {self.name} has under this name is not a session: {error}") from None
        if record is None:
            raise NoSession(
                f"there is no session {name!r} in {self.name}: `cellserve sessions list` shows all names (those of an "
                f"owner are OWNER/ID)"
            )
        if isinstance(record, TombstoneRecord):
            raise NoSession(f"{name}: the session has ended at position {record.position} ({record.reason})")
        try:
            states = unpack_states(self._models.states_of(record), record.states)
        except ValueError:
            raise SessionFailed(f"{name}: its states in {self.name} do not fit its model") from None
        except SessionFailed as error:
            raise SessionFailed(f"{name}: {error}") from None
        owner, _, session_id = name.rpartition("/")
        session = SavedSession(
            session_id, owner, record.model, record.version, record.digest, record.stamp.position, states,
            record.creation_digest, record.last, record.created_at,
        )  # fmt: skip
        return Found(session, expires_in, self.durable)

    def write(self, session: SavedSession, replace: bool) -> bool:
        """Creates a session with everything that its file has."""
        name, owner = session.name, session.owner
        if owner is None:
            raise SessionFailed(f"{name}: its file does not say whose it is: give --owner NAME ('' for nobody's)")
        states = b"".join(state.tobytes() for state in session.states.values())
        stamp = VersionStamp(session.position, new_revision())
        model = session.model, session.version, session.digest
        created_at = time.time() if session.created_at is None else session.created_at
        record = SessionRecord(*model, session.creation_digest, stamp, states, session.last, created_at)
        create = self._client().replace if replace else self._client().create
        outcome = self._run(create(name, record, Room(2**53, owner, NO_LIMITS)))
        if outcome is WriteOutcome.WRITTEN:
            return True
        if outcome is WriteOutcome.EXISTS:
            there = self._run(self._client().load(name))
            if isinstance(there, SessionRecord) and _content(there) == _content(record):
                return False
            raise SessionFailed(f"{name} exists already, and is another: --replace puts that of the file in its place")
        if outcome is WriteOutcome.GONE:
            raise SessionFailed(f"{name} has ended there: --replace creates it all the same")
        raise SessionsError(f"{name}: {self.name} is full")

    def close(self) -> None:
        """Closes the store."""
        if self._opened is not None:
            self._run(self._opened.close())
        self._runner.close()

    def _find(self, name: str) -> tuple[SessionRecord | TombstoneRecord | None, float]:
        """Returns a session and the seconds until it expires, or its tombstone; raises UnreadableRecord."""
        raise NotImplementedError

    def _open(self) -> StoreClient:
        """Opens the store for writing."""
        raise NotImplementedError

    def _client(self) -> StoreClient:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._runner.run(work)
        except StoreUnusable as error:
            raise SessionsError(str(error)) from None
        except Problem as problem:
            raise SessionsError(f"{self.name}: {problem.detail}") from None


class LmdbFolder(Store):
    """The sessions in a folder of LMDB; a `Place`. A server may use it while they are read.

    Args:
        path: The folder.
        settings: Those of the server that uses it, from the environment.
        models: The models of its sessions.
    """

    def __init__(self, path: Path, settings: Settings, models: Models) -> None:
        super().__init__(f"lmdb:{path}", models)
        self._path, self._settings = path, settings
        self._reader_opened: FolderReader | None = None

    def sessions(self) -> Iterator[Listed]:
        """Iterates over the sessions of all owners."""
        try:
            for one in self._reader().sessions():
                yield Listed(*one)
        except StoreUnusable as error:
            raise SessionsError(str(error)) from None

    def close(self) -> None:
        """Closes the folder."""
        if self._reader_opened is not None:
            self._reader_opened.close()
        super().close()

    def _find(self, name: str) -> tuple[SessionRecord | TombstoneRecord | None, float]:
        reader = self._reader()
        self.durable = reader.durable
        try:
            found = reader.find(name)
        except StoreUnusable as error:
            raise SessionsError(str(error)) from None
        return found.record, found.deadline - reader.now()

    def _reader(self) -> FolderReader:
        if self._reader_opened is None:
            try:
                self._reader_opened = FolderReader(self._path)
            except StoreUnusable as error:
                raise SessionsError(str(error)) from None
        return self._reader_opened

    def _open(self) -> StoreClient:
        settings = self._settings
        # A new folder gets as many shards as a server with --workers auto would give it.
        workers = max(settings.workers, len(os.sched_getaffinity(0)))
        how = settings.store_max_bytes, settings.store_sync == "always", settings.store_checkpoint_seconds, workers
        times = settings.session_idle_seconds, settings.tombstone_seconds
        try:
            return LmdbClient(Folder(self._path, *how), *times, settings.store_max_bytes)
        except FolderInUse:
            raise SessionsError(f"a server uses {self._path}: import into it with --url, or stop it first") from None
        except StoreUnusable as error:
            raise SessionsError(str(error)) from None
        except Problem as problem:
            raise SessionsError(f"{self.name}: {problem.detail}") from None


def _content(record: SessionRecord) -> tuple[object, ...]:
    return record.digest, record.stamp.position, record.states, record.last
