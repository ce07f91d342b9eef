"""Reading a store's folder from outside: beside the server that uses it, or while none does."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import lmdb

from cellserve.service.sessions.session import Durable
from cellserve.service.sessions.stores.lmdb.checkpoint import Checkpoint
from cellserve.service.sessions.stores.lmdb.environment import DATABASES, READERS, Environment, check_whole
from cellserve.service.sessions.stores.lmdb.folder import About, shard_number
from cellserve.service.sessions.stores.lmdb.header import from_key, to_key
from cellserve.service.sessions.stores.lmdb.records import Found, Records
from cellserve.service.sessions.stores.protocol import StoreUnusable

_PAGE = 1000  # sessions that are read in one transaction: a long one would keep pages from being reused
_TRY_SECONDS = 2.0  # to begin transactions at one moment, while workers commit


class Shard:
    """An LMDB file that is only read. Other processes may write it meanwhile.

    Args:
        folder: Holds the file.

    Raises:
        StoreUnusable: The file cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint.load(folder)
        if checkpoint is not None and checkpoint.went_down:
            raise StoreUnusable(
                f"--store: the machine went down while {folder.parent} was in use: start a server on it first, which "
                f"takes it back to its last checkpoint"
            )
        self.synced = checkpoint is None
        try:
            # A map of size 0 is as large as that of the server, so that the file may grow.
            self._env = lmdb.open(
                str(folder), map_size=0, readonly=True, max_dbs=DATABASES, max_readers=READERS, readahead=False,
                mode=0o600,
            )  # fmt: skip
        except lmdb.Error as error:
            raise StoreUnusable(f"--store: {folder} cannot be read: {error}") from None
        check_whole(self._env, folder)

    def database(self, name: bytes) -> Any:
        """Returns a database in the file."""
        try:
            return self._env.open_db(name, create=False)
        except lmdb.Error as error:
            raise StoreUnusable(f"--store: there is no store of sessions in this folder: {error}") from None

    def read(self) -> lmdb.Transaction:
        """Returns a read transaction: a context manager, whose values are views of the map."""
        return self._env.begin(buffers=True)

    def is_newest(self, transaction: lmdb.Transaction) -> bool:
        """Returns whether nothing was committed since a transaction began."""
        return bool(self._env.info()["last_txnid"] == transaction.id())

    def copy(self, transaction: lmdb.Transaction, folder: Path) -> None:
        """Copies the file, as a transaction sees it and without its free pages, to a folder, and syncs it."""
        self._env.copy(str(folder), compact=True, txn=transaction)
        file = folder / "data.mdb"
        file.chmod(0o600)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Closes the file."""
        self._env.close()


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turns what LMDB says of a file that is damaged into StoreUnusable."""
    try:
        yield
    except (lmdb.Error, struct.error) as error:
        raise StoreUnusable(f"--store: {folder} is damaged ({error}): restore a backup of it") from None


class ListedSession(NamedTuple):
    """A session in a list."""

    key: str
    model: str
    version: int
    position: int
    created_at: float  # seconds since the epoch
    expires_in: float  # seconds
    unreadable: str  # why what is there is not a session; empty if it is one


class FolderReader:
    """The sessions of a folder, read without changing them.

    Args:
        path: The folder.

    Raises:
        StoreUnusable: There is no store in it, or none that can be read as it is.
    """

    def __init__(self, path: Path) -> None:
        about = About.load(path)
        if about is None:
            raise StoreUnusable(f"--store: there is no store of sessions in {path}")
        if about.is_older:
            raise StoreUnusable(f"--store: {path} has an older format: start a server on it first, which migrates it")
        self.path, self.about = path, about
        self.shards: list[Shard] = []
        try:
            for number in range(about.shards):
                self.shards.append(Shard(path / str(number)))
            # Of an environment it uses what a shard has too, as long as it only reads.
            self._records = [Records(cast(Environment, shard), 0, 0) for shard in self.shards]
        except StoreUnusable:
            self.close()
            raise

    @property
    def durable(self) -> Durable:
        """What its sessions outlive, by how the folder was written last."""
        return "disk" if all(shard.synced for shard in self.shards) else "process"

    def now(self) -> float:
        """Returns the time by the store's clock."""
        return self.about.now()

    def sessions(self) -> Iterator[ListedSession]:
        """Iterates over the live sessions of all owners."""
        for records in self._records:
            start = b""
            while True:
                with _told(self.path):
                    page = records.page(b"", start, _PAGE, self.now())
                for one in page:
                    times, unreadable = (one.created_at, one.deadline - self.now()), str(one.unreadable or "")
                    yield ListedSession(from_key(one.key), one.model, one.version, one.position, *times, unreadable)
                if len(page) < _PAGE:
                    break
                start = page[-1].key + b"\0"

    def count(self) -> int:
        """Returns the number of sessions, with those that have expired and are not removed yet."""
        return sum(records.count() for records in self._records)

    def find(self, key: str) -> Found:
        """Reads a session, or its tombstone; raises UnreadableRecord."""
        stored = to_key(key)
        with _told(self.path):
            return self._records[shard_number(stored, len(self._records))].load(stored, self.now())

    def begin_together(self, stack: ExitStack) -> tuple[list[lmdb.Transaction], bool]:
        """Begins a read transaction in each shard; also returns whether all see the store at one moment.

        They do if nothing was committed to any shard between the first beginning and the last. While workers commit
        all the time, that takes some tries.
        """
        until = time.monotonic() + _TRY_SECONDS
        while True:
            transactions = [shard.read() for shard in self.shards]
            one_moment = all(map(Shard.is_newest, self.shards, transactions))
            if one_moment or time.monotonic() > until:
                return [stack.enter_context(one) for one in transactions], one_moment
            for one in transactions:
                one.abort()

    def close(self) -> None:
        """Closes the files."""
        for shard in self.shards:
            shard.close()
