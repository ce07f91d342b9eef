"""A backup: a copy of a store's folder, taken while a server serves from it and its workers write.

It is a folder like any other: a server can use it as it is. Its clock stands still until one does, so that a session
has as much time left then as it had at the backup.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import lmdb

from cellserve.service.sessions.stores.lmdb.checkpoint import sync_folder
from cellserve.service.sessions.stores.lmdb.reader import FolderReader
from cellserve.service.sessions.stores.protocol import StoreUnusable

_OF_FILE_SYSTEM = "lost+found"  # is in the root of a volume


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup that was taken."""

    sessions: int  # also those that had expired and were not removed yet
    shards: int
    bytes: int
    one_moment: bool  # whether all shards are as they were at one moment


def back_up(source: Path, target: Path) -> Backup:
    """Copies a store's folder to one that does not exist yet, or is empty.

    What says that the target is a store is written last: a copy that was interrupted is refused by a server.

    Raises:
        StoreUnusable: The one cannot be read, or the other not be written; the message says why.
    """
    try:
        if target.exists() and any(one.name != _OF_FILE_SYSTEM for one in target.iterdir()):
            raise StoreUnusable(f"{target} is not empty: give a folder that does not exist yet, or is empty")
        with closing(FolderReader(source)) as reader:
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            return _copy(reader, target)
    except (OSError, lmdb.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StoreUnusable(f"{source} could not be copied to {target}: {reason}") from None


def _copy(reader: FolderReader, target: Path) -> Backup:
    folders = [target / str(number) for number in range(reader.about.shards)]
    try:
        with ExitStack() as stack:
            transactions, one_moment = reader.begin_together(stack)
            stopped = reader.now()
            for shard, transaction, folder in zip(reader.shards, transactions, folders, strict=True):
                folder.mkdir(mode=0o700)
                shard.copy(transaction, folder)
                sync_folder(folder)
        replace(reader.about, stopped=stopped, behind=0.0).save(target)
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    with closing(FolderReader(target)) as copy:
        sessions = copy.count()
    size = sum((folder / "data.mdb").stat().st_size for folder in folders)
    return Backup(sessions, len(folders), size, one_moment)
