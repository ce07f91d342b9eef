"""An LMDB environment: one file, its transactions, and what they are worth after a crash.

Every commit is written before it is acknowledged, so it outlives any crash of a process. With `sync`, LMDB also syncs
it to disk, in a thread, several waiting changes in one transaction. Without, checkpoints are taken.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from cellserve.service.access.private_files import append_private
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

_READERS = 2048  # a worker needs a few
_DATABASES = 16
_EARLY_BYTES = 256 * 1024 * 1024  # a file that has grown by so much since the last checkpoint gets the next one early

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
        self._write_watch: AbstractContextManager[None] = nullcontext() if watchdog is None else watchdog.watch()
        self._checkpoint_watch: AbstractContextManager[None] = nullcontext() if watchdog is None else watchdog.watch()
        self.errors = {"full": 0, "failed": 0}
        self.syncs = 0  # commits or checkpoints that were synced to disk
        self._failing = False
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(folder.parent)
            self._env = lmdb.open(
                str(folder), map_size=max_bytes, max_dbs=_DATABASES, max_readers=_READERS, sync=sync, metasync=sync,
                readahead=False, max_spare_txns=4, mode=0o600,
            )  # fmt: skip
        except lmdb.Error as error:
            raise StoreUnusable(f"--store: {folder} cannot be used: {error}") from None
        self._lock = append_private(folder / "checkpoint.lock")
        self._data = os.open(folder / "data.mdb", os.O_RDWR)
        self._thread = ThreadPoolExecutor(1, "store")
        self._checkpoints = ThreadPoolExecutor(1, "checkpoint")
        self._pin: lmdb.Transaction | None = None  # keeps the pages of the last checkpoint
        self._checkpointed = 0.0  # when, in seconds of time.monotonic
        self._checkpointing = threading.Lock()
        self._pages = 0  # size of the file at the last checkpoint
        self._queue: list[tuple[Job[Any], asyncio.Future[Any]]] = []
        self._draining: asyncio.Task[None] | None = None

    def begin_checkpoints(self) -> None:
        """Makes the store good for a power cut before anything is written."""
        if self.sync:
            self._env.sync(True)
            forget(self.folder)
        elif self._checkpoint_seconds:
            self.checkpoint()
        else:
            Checkpoint(boot_id(), time.time(), False, "").save(self.folder)

    def database(self, name: bytes) -> Any:
        """Returns a database in the file, after creating it if necessary."""
        # In a transaction of ours: that of `open_db` would wait for the lock without letting other threads run.
        return self.run(lambda transaction: self._env.open_db(name, txn=transaction))

    def read(self) -> lmdb.Transaction:
        """Returns a read transaction: a context manager, whose values are views of the map."""
        return self._env.begin(buffers=True)

    def run(self, job: Job[T]) -> T:
        """Returns what a job returns in a write transaction; raises StoreUnavailable, and then nothing is written."""
        try:
            with self._write_watch, self._env.begin(write=True, buffers=True) as transaction:
                result = job(transaction)
            self.syncs += self.sync
        except lmdb.Error as error:
            raise self._failed(error) from None
        if self._failing:
            self._failing = False
            log.info("the store can be written again")
        return result

    async def write(self, job: Job[T], large: bool = False) -> T:
        """Returns what `run` returns; a job that syncs, or is large, runs in a thread, with others that wait."""
        if not (self.sync or large):
            return self.run(job)
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
            return self.run(lambda transaction: [job(transaction) for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            return [result for job in jobs for result in self._run_together([job])]

    def _failed(self, error: lmdb.Error) -> Problem:
        full = isinstance(error, lmdb.MapFullError | lmdb.DiskError) or "No space left" in str(error)
        self.errors["full" if full else "failed"] += 1
        why = "--store-max-bytes is reached" if isinstance(error, lmdb.MapFullError) else str(error)
        if not self._failing:  # logged once, not for each request
            self._failing = True
            log.error("the store %s cannot be written: %s", self.folder, why)
        return StoreUnavailable(
            "the session store is full, nothing was changed: delete sessions, or try again later"
            if full
            else "the session store cannot be written, nothing was changed: send the request again in a second"
        )

    @property
    def bytes_used(self) -> int:
        """Bytes of the file up to its last page in use or kept for reuse."""
        return (int(self._env.info()["last_pgno"]) + 1) * int(self._env.stat()["psize"])

    @property
    def readers(self) -> int:
        """Read transactions that are open or kept, in all processes."""
        return int(self._env.info()["num_readers"])

    def keep_house(self) -> None:
        """Frees what dead processes held, and starts a checkpoint if one is due."""
        self._env.reader_check()
        if self.sync or not self._checkpoint_seconds or self._checkpointing.locked():
            return
        age = time.monotonic() - self._checkpointed
        if age >= self._checkpoint_seconds or self.bytes_used - self._pages > _EARLY_BYTES:
            self._checkpoints.submit(self._checkpoint_or_log)

    def checkpoint(self, clean: bool = False) -> None:
        """Syncs the file and saves its root; raises OSError.

        Every process takes checkpoints, and keeps the pages of its own until its next: whichever of them dies, the
        pages of the last checkpoint are kept by another.
        """
        with self._checkpointing:
            fcntl.flock(self._lock, fcntl.LOCK_EX)  # in order: an older checkpoint must not replace a newer one
            try:
                with self._checkpoint_watch, self._env.begin(write=True):  # nothing commits meanwhile
                    pin = self._env.begin()
                    root = read_root(self._data, pin.id())
                self._pages, at = self.bytes_used, time.time()
                os.fdatasync(self._data)
                Checkpoint(boot_id(), at, clean, root).save(self.folder)
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self.syncs += 1
            if self._pin is not None:
                self._pin.abort()
            self._pin, self._checkpointed = pin, time.monotonic()

    def _checkpoint_or_log(self) -> None:
        try:
            self.checkpoint()
        except (OSError, lmdb.Error) as error:
            self.errors["failed"] += 1
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
        self._env.close()
        os.close(self._data)
        self._lock.close()
