"""The folder of an LMDB store: its format, who may use it, and its environments, over which sessions are spread.

FOLDER/store.json      format and number of shards
FOLDER/server.lock     held by the one server that uses the folder
FOLDER/workers.lock    held by each of its processes
FOLDER/0/data.mdb      the first shard, an LMDB environment; beside it, its checkpoint
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import orjson

from cellserve.service.access.private_files import append_private, check_file, create_private
from cellserve.service.sessions.stores.lmdb.checkpoint import recover, sync_folder
from cellserve.service.sessions.stores.lmdb.environment import Environment
from cellserve.service.sessions.stores.lmdb.watchdog import Watchdog
from cellserve.service.sessions.stores.protocol import StoreUnusable

_FORMAT = 2
# What makes a folder's format the next one, by the former. Each may be run again after a crash: the number in
# store.json changes last.
_MIGRATIONS: dict[int, Callable[[Path], None]] = {}
_ABOUT = "store.json"
_MOST_BYTES = 64 * 1024  # of it
_MOST_SHARDS = 8
_ORPHANS_SECONDS = 10.0  # workers of a server that was killed notice and end within so long
_NETWORK = (
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs",
    "ocfs2", "orangefs", "pvfs2", "smb",
)  # fmt: skip  # and what begins with these
_LOCAL = "fuseblk", "fuse.fuse-overlayfs", "fuse.ntfs-3g", "fusectl"

log = logging.getLogger("cellserve")


class FolderInUse(StoreUnusable):
    """Another server uses the folder."""


class Folder:
    """A store's folder, open in this process.

    Args:
        path: The folder; created if necessary.
        max_bytes: Bytes of all shards, at most.
        sync: Sync each commit to disk.
        checkpoint_seconds: Without `sync`, seconds between checkpoints; 0: none.
        workers: Processes that will share it.

    Raises:
        StoreUnusable: The folder cannot be used; the message says why.
    """

    def __init__(self, path: Path, max_bytes: int, sync: bool, checkpoint_seconds: float, workers: int = 1) -> None:
        self.path, self.sync, self.alone = path, sync, workers == 1
        self._is_worker = multiprocessing.parent_process() is not None
        self._locks: list[IO[bytes]] = []
        self.shards: list[Environment] = []
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_network(path)
            self._lock()
            about = self._read_about(1 if sync else min(workers, _MOST_SHARDS))
            if not self._is_worker:
                Watchdog.reserve(path / "writers")
            behind = about.behind
            # Returns the time by the store's clock, in seconds since the epoch.
            self.clock: Callable[[], float] = (lambda: time.time() - behind) if behind else time.time
            watchdog = Watchdog(path / "writers") if self._is_worker else None
            self._how = max_bytes // about.shards, sync, checkpoint_seconds, watchdog
            self._folders = [path / str(number) for number in range(about.shards)]
            if not self._is_worker:
                for folder in self._folders:
                    for name in ("data.mdb", "checkpoint"):
                        check_file(folder / name)
                    _recover(folder)
            self._open()
        except OSError as error:
            self._unlock()
            raise StoreUnusable(f"--store: {path} cannot be used: {error.strerror or error}") from None
        except StoreUnusable:
            self._unlock()
            raise

    def _open(self) -> None:
        for folder in self._folders:
            self.shards.append(Environment(folder, *self._how))

    def _unlock(self) -> None:
        for lock in self._locks:
            lock.close()

    def shard_of(self, key: bytes) -> int:
        """Returns the number of the shard that a key belongs to."""
        return shard_number(key, len(self.shards))

    def rows_by_shard(self, keys: Iterable[bytes]) -> dict[int, list[int]]:
        """Returns the rows of the keys that belong to each shard."""
        count = len(self.shards)
        rows: dict[int, list[int]] = {}
        for row, key in enumerate(keys):
            rows.setdefault(zlib.crc32(key) % count, []).append(row)  # `shard_number`, in half of its time
        return rows

    async def leave_to_workers(self) -> None:
        """Closes the shards, and keeps the folder from other servers until `close`."""
        for shard in self.shards:
            await shard.close(last=False)
        self.shards = []

    async def close(self) -> None:
        """Closes the shards, and gives the folder back; after `leave_to_workers`, call it when they have ended."""
        if not self.shards and self._is_in_place:  # not where another is by now
            self._open()
        for shard in self.shards:
            await shard.close(last=not self._is_worker)
        self._unlock()

    @property
    def _is_in_place(self) -> bool:
        """Whether the folder is the one that was locked, not removed or replaced meanwhile."""
        try:
            return os.path.samestat(os.stat(self.path / "workers.lock"), os.fstat(self._locks[0].fileno()))
        except OSError:
            return False

    def _lock(self) -> None:
        """Makes sure that one server uses the folder: this one, or the one that this process is a worker of."""
        workers = append_private(self.path / "workers.lock")
        self._locks.append(workers)
        if self._is_worker:
            fcntl.flock(workers, fcntl.LOCK_SH)
            return
        server = append_private(self.path / "server.lock")
        self._locks.append(server)
        for lock, patience in ((server, 0.0), (workers, _ORPHANS_SECONDS)):
            until = time.monotonic() + patience
            while not _locked(lock):
                if time.monotonic() >= until:
                    raise FolderInUse(
                        f"--store: another server uses {self.path}: stop it, start this one with more --workers "
                        f"instead, or give it a folder of its own (several machines share redis://...)"
                    )
                time.sleep(0.1)
        fcntl.flock(workers, fcntl.LOCK_UN)

    def _read_about(self, shards: int) -> About:
        """Returns what the folder says of itself, after creating a new store, or migrating an older one."""
        about = About.load(self.path)
        if about is None:
            if (self.path / "0").exists():
                raise StoreUnusable(
                    f"--store: {self.path} cannot be used: it has a part of a store, but no {_ABOUT} (a copy that was "
                    f"interrupted?): copy it again, or give another folder"
                )
            about = About(_FORMAT, shards)
            about.save(self.path)
        while about.is_older:
            log.info("the store %s is migrated from format %d", self.path, about.format)
            _MIGRATIONS[about.format](self.path)
            about = replace(about, format=about.format + 1)
            about.save(self.path)
        if about.stopped is not None and not self._is_worker:  # the parent starts the clock
            about = replace(about, behind=time.time() - about.stopped, stopped=None)
            about.save(self.path)
        return about


@dataclass(frozen=True, slots=True)
class About:
    """What store.json says."""

    format: int
    shards: int
    behind: float = 0.0  # seconds that the store's clock is behind the system's
    stopped: float | None = None  # where the clock of a backup stands still, until a server uses it

    @classmethod
    def load(cls, folder: Path) -> About | None:
        """Reads a folder's file; returns None if there is none.

        Raises:
            StoreUnusable: It is damaged, or of a format that is not read.
        """
        file = folder / _ABOUT
        try:
            check_file(file, _MOST_BYTES)
            found = orjson.loads(file.read_bytes())
            stopped = found.get("stopped")
            about = cls(
                int(found["format"]), int(found["shards"]), float(found.get("behind", 0)),
                None if stopped is None else float(stopped),
            )  # fmt: skip
            if not 1 <= about.shards <= _MOST_SHARDS:
                raise ValueError
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreUnusable(f"--store: {folder} cannot be used: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StoreUnusable(f"--store: {file} is damaged: restore the folder from a backup") from None
        if about.format > _FORMAT:
            raise StoreUnusable(
                f"--store: {folder} has format {about.format}, of a newer Cellserve; this one reads up to {_FORMAT}: "
                f"use the newer one, or give another folder"
            )
        if not all(number in _MIGRATIONS for number in range(about.format, _FORMAT)):
            raise StoreUnusable(
                f"--store: {folder} has format {about.format}, which this Cellserve does not read (it reads {_FORMAT}"
                f"): export its sessions with the Cellserve that wrote it, or give another folder"
            )
        return about

    def save(self, folder: Path) -> None:
        """Replaces a folder's file atomically, and syncs it."""
        file = folder / _ABOUT
        new = file.with_suffix(".new")
        with create_private(new) as opened:
            opened.write(orjson.dumps(asdict(self)))
            opened.flush()
            os.fsync(opened.fileno())
        new.replace(file)
        sync_folder(folder)

    @property
    def is_older(self) -> bool:
        """Whether the folder is migrated when a server uses it."""
        return self.format < _FORMAT

    def now(self) -> float:
        """Returns the time by the store's clock, in seconds since the epoch."""
        return time.time() - self.behind if self.stopped is None else self.stopped


def shard_number(key: bytes, shards: int) -> int:
    """Returns the number of the shard, of so many, that a key belongs to."""
    return 0 if shards == 1 else zlib.crc32(key) % shards


def _recover(folder: Path) -> None:
    went_back = recover(folder)
    if went_back is not None:
        at = datetime.fromtimestamp(went_back.at, UTC).isoformat(timespec="seconds")
        log.warning(
            "the machine went down: the sessions in %s are as of their checkpoint at %s; later changes are lost, and "
            "clients that are ahead get 409 session-went-back", folder, at,
        )  # fmt: skip


def _locked(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refuse_network(path: Path) -> None:
    """Raises StoreUnusable if a folder is on a network file system: its maps and locks are not those of one machine."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return
    device = os.stat(path).st_dev
    kind = network_kind(mounts.read_text(), f"{os.major(device)}:{os.minor(device)}")
    if kind is not None:
        raise StoreUnusable(
            f"--store: {path} is on a network file system ({kind}), where LMDB cannot work: give a folder on a "
            f"local disk, or a shared store such as redis://HOST:PORT"
        )


def network_kind(mounts: str, device: str) -> str | None:
    """Returns the type of a device's file system if it is one of a network, or may be.

    Args:
        mounts: The content of /proc/self/mountinfo.
        device: The device's numbers, MAJOR:MINOR.
    """
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        kind = after.split()[0]
        if before.split()[2] == device and kind.startswith(_NETWORK) and kind not in _LOCAL:
            return kind
    return None
