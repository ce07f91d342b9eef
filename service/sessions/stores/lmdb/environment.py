"""An LMDB environment: one file, its transactions, and what they are worth after a crash.

Every commit is written before it is acknowledged, so it outlives any crash of a process. With `sync`, LMDB also syncs
it to disk, in a thread, several waiting changes in one transaction. Without, checkpoints are taken.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from cellserve.service.access.private_files import append_private, reserve_private
from cellserve.service.errors import Problem, StoreUnavailable
from cellserve.service.sessions.stores.lmdb.checkpoint import (
    Checkpoint,
    boot_id,
    forget,
    read_root,
    sync_folder,
)
from cellserve.service.sessions.stores.lmdb.watchdog import Watchdog
from cellserve.service.sessions.stores.protocol import StoreUnusable

T = TypeVar("T")
Job = Callable[[lmdb.Transaction], T]

READERS = 2048  # a worker needs a few
_READER_BYTES = 64  # of LMDB's lock file; its head is smaller than a few of these
DATABASES = 16
# A file that has grown by so much since the last checkpoint gets the next one early. A commit to pages that are used
# again takes a quarter of the time that one to new pages does: those must be allocated, and mapped by the next reader.
_EARLY_BYTES = 16 * 1024 * 1024
_LOOKED_EVERY = 16  # commits after which that is looked at
_FULL = tuple(os.strerror(number) for number in (ENOSPC, EDQUOT, EFBIG))  # how errors of a full disk read
_NO_BYTES = 64 * 1024  # a disk with less is full
_CALM_SECONDS = 5.0  # without failed writes, after which the log says that writing works again

log = logging.getLogger("cellserve")


class Environment:
    """One LMDB file in a folder.

    Args:
        folder: Holds the file; created if necessary.
        max_bytes: The file's size, at most; memory is mapped for all of it, and used as it grows.
        sync: Sync each commit to disk.
        checkpoint_seconds: Without `sync`, seconds between checkpoints; 0: none.
        watchdog: Watches how long writes take.

    Raises:
        StoreUnusable: The folder or the file cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        sync: bool,
        checkpoint_seconds: float,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.folder, self.sync = folder, sync
        self._checkpoint_seconds = checkpoint_seconds
        self._loop_watch, self._thread_watch, self._checkpoint_watch = (
            nullcontext() if watchdog is None else watchdog.watch() for _ in range(3)
        )
        self.errors = {"full": 0, "failed": 0}
        self._synced: deque[float] = deque()  # seconds of each sync to disk, until `take_syncs`
        self._failing = self._no_checkpoint = False  # what was said in the log
        self._failed_at = 0.0  # the last write, in seconds of time.monotonic
        self._gone = ""  # why nothing can be written any more
        self._needs_pages = False  # whether the next checkpoint should come at once, so that pages can be reused
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(folder.parent)
            reserve_private(folder / "lock.mdb", _READER_BYTES * (READERS + 8))
            self._env = lmdb.open(
                str(folder), map_size=max_bytes, max_dbs=DATABASES, max_readers=READERS, sync=sync, metasync=sync,
                readahead=False, max_spare_txns=4, mode=0o600,
            )  # fmt: skip
        except lmdb.Error as error:
            raise StoreUnusable(f"--store: {folder} cannot be used: {error}") from None
        check_whole(self._env, folder)
        self._lock = append_private(folder / "checkpoint.lock")
        self._data = os.open(folder / "data.mdb", os.O_RDWR)
        self._thread = ThreadPoolExecutor(1, "store")
        self._checkpoints = ThreadPoolExecutor(1, "checkpoint")
        self._submitted: Future[None] = Future()  # the last checkpoint that was given to the thread
        self._submitted.set_result(None)
        self._pin: lmdb.Transaction | None = None  # keeps the pages of the last checkpoint
        self._checkpointed = 0.0  # when, in seconds of time.monotonic
        self._checkpointing = threading.Lock()
        self._bytes = 0  # of the file at the last checkpoint
        self._commits = 0
        self._queue: list[tuple[Job[Any], asyncio.Future[Any]]] = []
        self._draining: asyncio.Task[None] | None = None

    def begin_checkpoints(self) -> None:
        """Makes the store good for a power cut before anything is written; raises StoreUnusable."""
        try:
            if self.sync:
                self._env.sync(True)
                forget(self.folder)
            elif self._checkpoint_seconds:
                self.checkpoint()
            else:
                Checkpoint(boot_id(), time.time(), False, "").save(self.folder)
        except (OSError, lmdb.Error) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> StoreUnusable:
        return StoreUnusable(f"--store: {self.folder} cannot be used: {getattr(error, 'strerror', None) or error}")

    def database(self, name: bytes) -> Any:
        """Returns a database in the file, after creating it if necessary."""
        # In a transaction of ours: that of `open_db` would wait for the lock without letting other threads run.
        try:
            with self._loop_watch, self._env.begin(write=True) as transaction:
                return self._env.open_db(name, txn=transaction)
        except lmdb.Error as error:
            raise self._unusable(error) from None

    def read(self) -> lmdb.Transaction:
        """Returns a read transaction: a context manager, whose values are views of the map.

        Raises:
            StoreUnavailable: It is closed, for a request that outlived the server's stop; or it has too many readers.
        """
        try:
            return self._env.begin(buffers=True)
        except lmdb.Error:
            raise StoreUnavailable from None

    def run(self, job: Job[T]) -> T:
        """Returns what a job returns in a write transaction; raises StoreUnavailable, and then nothing is written."""
        return self._run(job, self._loop_watch)

    def _run(self, job: Job[T], watch: AbstractContextManager[None]) -> T:
        self._check_there()
        try:
            with watch, self._env.begin(write=True, buffers=True) as transaction:
                result = job(transaction)
                if self.sync:
                    start = time.perf_counter()
            if self.sync:
                self._synced.append(time.perf_counter() - start)
        except lmdb.Error as error:
            raise self._failed(error) from None
        self._commits += 1
        if not self._commits % _LOOKED_EVERY:
            self._begin_checkpoint_if_due()
        return result

    def _check_there(self) -> None:
        if self._gone:
            raise StoreUnavailable(f"{self._gone}: nothing was changed")

    async def write(self, job: Job[T], large: bool = False) -> T:
        """Returns what `run` returns; a job that syncs, or is large, runs in a thread, with others that wait."""
        if not (self.sync or large):
            return self.run(job)
        self._check_there()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._queue.append((job, done))
        if self._draining is None:
            self._draining = loop.create_task(self._drain())
        return await done

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._queue:
                waiting, self._queue = self._queue, []
                results = await loop.run_in_executor(self._thread, self._run_together, [job for job, _ in waiting])
                for (_, done), result in zip(waiting, results, strict=True):
                    if done.done():
                        continue
                    if isinstance(result, Exception):
                        done.set_exception(result)
                    else:
                        done.set_result(result)
        finally:
            self._draining = None

    def _run_together(self, jobs: list[Job[Any]]) -> list[Any]:
        """Returns the result of each job, or its error; all in one transaction if possible."""
        try:
            return self._run(lambda transaction: [job(transaction) for job in jobs], self._thread_watch)
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            return [result for job in jobs for result in self._run_together([job])]

    def _failed(self, error: lmdb.Error) -> Problem:
        full = isinstance(error, lmdb.MapFullError) or self._is_full(error)
        self.errors["full" if full else "failed"] += 1
        self._needs_pages = True
        self._failed_at = time.monotonic()
        why = "--store-max-bytes is reached" if isinstance(error, lmdb.MapFullError) else str(error)
        if not self._failing:  # logged once, not for each request
            self._failing = True
            log.error("the store %s cannot be written: %s", self.folder, why)
        return StoreUnavailable(
            "the session store is full, nothing was changed: delete sessions, or try again later"
            if full
            else "the session store cannot be written, nothing was changed: send the request again in a second"
        )

    def _is_full(self, error: Exception) -> bool:
        """Returns whether a disk is full; if LMDB could write only a part of something, its error does not say so."""
        return any(reason in str(error) for reason in _FULL) or self.free_bytes < _NO_BYTES

    @property
    def bytes_used(self) -> int:
        """Bytes of the file up to its last page in use or kept for reuse; raises StoreUnavailable as `read` does."""
        try:
            return (int(self._env.info()["last_pgno"]) + 1) * int(self._env.stat()["psize"])
        except lmdb.Error:
            raise StoreUnavailable from None

    @property
    def free_bytes(self) -> int:
        """Bytes that the disk has left."""
        disk = os.fstatvfs(self._data)
        return disk.f_bavail * disk.f_frsize if disk.f_blocks else sys.maxsize  # 0: a file system without a bound

    def take_syncs(self) -> list[float]:
        """Returns the seconds of each sync to disk since the last call."""
        return [self._synced.popleft() for _ in range(len(self._synced))]

    @property
    def checkpoint_age(self) -> float | None:
        """Seconds since the last checkpoint of any process; None if none are taken, or the last one is damaged."""
        if self.sync or not self._checkpoint_seconds:
            return None
        with suppress(StoreUnusable):
            found = Checkpoint.load(self.folder)
            return None if found is None else time.time() - found.at
        return None

    @property
    def readers(self) -> int:
        """Read transactions that are open or kept, in all processes."""
        return int(self._env.info()["num_readers"])

    def keep_house(self) -> None:
        """Frees what dead processes held, and starts a checkpoint if one is due."""
        if not self._gone and not self._is_in_place:
            self._gone = "the session store's folder was removed or replaced"
            log.error("the store %s was removed or replaced: nothing more is written; stop this server", self.folder)
        self._env.reader_check()
        # On a full disk some writes succeed, as soon as pages are free again.
        if self._failing and time.monotonic() - self._failed_at > _CALM_SECONDS:
            self._failing = False
            log.info("the store %s can be written again", self.folder)
        self._begin_checkpoint_if_due()

    @property
    def _is_in_place(self) -> bool:
        """Whether the file is still that of its name: a folder that was restored under a server has another."""
        try:
            return os.path.samestat(os.stat(self.folder / "data.mdb"), os.fstat(self._data))
        except OSError:
            return False

    def _begin_checkpoint_if_due(self) -> None:
        if self.sync or not self._checkpoint_seconds or self._gone or not self._submitted.done():
            return
        age = time.monotonic() - self._checkpointed
        if self._needs_pages or age >= self._checkpoint_seconds or self.bytes_used - self._bytes > _EARLY_BYTES:
            self._needs_pages = False
            self._submitted = self._checkpoints.submit(self._checkpoint_or_log)

    def checkpoint(self, clean: bool = False) -> None:
        """Syncs the file and saves its root; raises OSError.

        Every process takes checkpoints, and keeps the pages of its own until its next: whichever of them dies, the
        pages of the last checkpoint are kept by another.
        """
        if not self._is_in_place:  # what is in its place has a checkpoint of its own
            raise OSError(f"{self.folder} was removed or replaced")
        with self._checkpointing:
            fcntl.flock(self._lock, fcntl.LOCK_EX)  # in order: an older checkpoint must not replace a newer one
            try:
                with self._checkpoint_watch, self._env.begin(write=True):  # nothing commits meanwhile
                    pin = self._env.begin()
                    root = read_root(self._data, pin.id())
                self._bytes, at = self.bytes_used, time.time()
                start = time.perf_counter()
                os.fdatasync(self._data)
                Checkpoint(boot_id(), at, clean, root).save(self.folder)
                self._synced.append(time.perf_counter() - start)
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            if self._pin is not None:
                self._pin.abort()
            self._pin, self._checkpointed = pin, time.monotonic()

    def _checkpoint_or_log(self) -> None:
        try:
            self.checkpoint()
            self._no_checkpoint = False
        except (OSError, lmdb.Error) as error:
            self.errors["full" if self._is_full(error) else "failed"] += 1
            if not self._no_checkpoint:
                self._no_checkpoint = True
                log.error("no checkpoint of the store %s, the previous one stays: %s", self.folder, error)

    async def close(self, last: bool) -> None:
        """Closes the file; the last process to do so leaves a checkpoint that says that nothing is missing."""
        while self._draining is not None:
            await asyncio.sleep(0.001)
        self._thread.shutdown()
        self._checkpoints.shutdown()
        if last and not self.sync:
            try:
                self.checkpoint(clean=True)
            except (OSError, lmdb.Error) as error:
                log.error("no last checkpoint of the store %s: %s", self.folder, error)
        if self._pin is not None:
            self._pin.abort()
        self._gone = "the server is stopping"
        self._env.close()
        os.close(self._data)
        self._lock.close()


def check_whole(environment: lmdb.Environment, folder: Path) -> None:
    """Raises StoreUnusable if the file ends before its last page: to read behind its end would end the process."""
    pages = environment.info()["last_pgno"] + 1
    if (folder / "data.mdb").stat().st_size < pages * environment.stat()["psize"]:
        environment.close()
        raise StoreUnusable(f"--store: {folder}/data.mdb is cut off: restore a backup of the folder")
