"""What all surfaces share: the settings, the models, an engine for each, and the sessions."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from cellserve.service.auth import Keys
from cellserve.service.engine.engine import Engine
from cellserve.service.errors import NotAnOperator, ServerFull
from cellserve.service.model_manager import Versions
from cellserve.service.model_repository.repository import Model, Repository
from cellserve.service.observability.counters import Counts
from cellserve.service.observability.prometheus import Metrics
from cellserve.service.runtime.onnx_model import RuntimeOptions
from cellserve.service.sessions.rollout import Rollouts
from cellserve.service.sessions.session import Durable
from cellserve.service.sessions.stores.memory import MemoryStore
from cellserve.service.sessions.stores.protocol import SessionStore
from cellserve.service.sessions.stores.snapshot import BadSnapshot, Snapshots
from cellserve.service.sessions.table import SessionTable
from cellserve.service.sessions.writer import SessionWriter
from cellserve.service.settings import Settings

if TYPE_CHECKING:
    from cellserve.service.observability.tracing import Tracing

log = logging.getLogger("cellserve")

_NICE = 10
_SWEEP_SECONDS = 1.0


def _yield_to_the_event_loop() -> None:
    """Lets the event loop go first where it shares a core with this thread, whose runs are the long ones."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _store(settings: Settings, table: SessionTable, versions: Versions) -> SessionStore:
    bounds = settings.max_sessions, settings.when_full
    if settings.store == "memory":
        durable: Durable = "none" if settings.snapshot is None else "snapshot"
        return MemoryStore(table, settings.max_sessions, settings.tombstone_seconds, settings.when_full, durable)
    # Here and not above: the package is an extra.
    from cellserve.service.sessions.stores.redis import RedisStore
    from cellserve.service.sessions.stores.redis_client import RedisClient

    times = settings.session_idle_seconds, settings.tombstone_seconds, settings.store_timeout_seconds
    client = RedisClient(settings.store, *times, settings.store_replicas)
    return RedisStore(client, table, settings.arena_sessions, *bounds, versions.holding)


def _tracing(settings: Settings) -> Tracing | None:
    if not settings.tracing:
        return None
    # Here and not above: the package is an extra.
    from cellserve.service.observability.tracing import Tracing

    return Tracing()


class ServiceContext:
    """One process's service.

    Args:
        settings: Its settings.

    Raises:
        BrokenModel: There is no model to serve.
        RuntimeUnavailable: The provider that was asked for is not to be had.
        BadKeysFile: The file of API keys cannot be read.
        BadSnapshot: The snapshot cannot be restored.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        options = RuntimeOptions(
            settings.provider, settings.threads, settings.spinning, settings.memory_arena, settings.optimization
        )
        self._executor = ThreadPoolExecutor(1, "tick", _yield_to_the_event_loop)
        table = SessionTable(settings.session_idle_seconds)
        self.tracing = _tracing(settings)
        self.versions = Versions(
            Repository(settings.models, options, settings.max_batch, settings.max_model_bytes),
            self._engine_of,
            table,
            settings.max_old_versions,
            # Of no lower priority: much of its work holds the interpreter's lock, and where the machine is busy one
            # that holds it and does not run kept the event loop waiting for up to 110 ms, at equal priority 29.
            ThreadPoolExecutor(1, "load"),
        )
        self.engines = self.versions.newest
        self.sessions = _store(settings, table, self.versions)
        self.writer = SessionWriter(self.sessions)
        self.rollouts = Rollouts(self.writer)
        self.counts = Counts()
        self.metrics = Metrics(
            self.counts, lambda: self.versions.loaded.values(), self.sessions, self.writer, settings.workers
        )
        self.observes_each_request = settings.access_log or settings.tracing  # then without the fast path
        self.keys = None if settings.api_keys_file is None else Keys(settings.api_keys_file)
        self.snapshots: Snapshots | None = None
        if settings.snapshot is not None and isinstance(self.sessions, MemoryStore):
            loaded = self.versions.loaded
            self.snapshots = Snapshots(
                settings.snapshot, self.sessions, lambda: list(loaded.values()), self.versions.held_at_once
            )
            restored = self.snapshots.restore()
            self.sessions.sweep()  # of those that have expired meanwhile
            log.info("%d sessions are back from %s", restored, settings.snapshot)
        self.ready = False
        self.stopping = False  # connections are to end as soon as they can
        self.exit_status = 0

    def _engine_of(self, model: Model) -> Engine:
        return Engine(model, self.settings, self._executor, self.tracing)

    def owner(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Gives whose request it is by its headers, empty where nobody needs a key; raises Unauthorized."""
        if self.keys is None:
            return ""
        return self.keys.owner(dict(headers).get(b"authorization"))

    def operator(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Gives which operator's request it is by its headers, empty where nobody needs a key.

        Raises:
            Unauthorized: It bears no key, or one that is not known.
            NotAnOperator: The key's owner is not one of the setting `operators`.
        """
        owner = self.owner(headers)
        if self.keys is not None and owner not in self.settings.operators.split(","):
            raise NotAnOperator(
                f"the key belongs to {owner!r}, who is not an operator here: send the key of one whom --operators "
                f"names, or ask at the port of --operations-port"
            )
        return owner

    def engine(self, model: str | None) -> Engine:
        """Gives the engine of the newest version of a model, or of the version named by `NAME:VERSION`.

        Args:
            model: May be left out where one is served.

        Raises:
            UnknownModel: There is none.
            VersionLoading: It has to be loaded: `engine_when_loaded` waits for it.
        """
        engine = self.engines.get(model)  # type: ignore[arg-type]
        return self.versions.named(model) if engine is None else engine

    async def engine_when_loaded(self, model: str | None) -> Engine:
        """Gives what `engine` gives, and waits for it where it has to be loaded."""
        return await self.versions.get(model)

    async def start(self) -> None:
        """Looks the store over; a store that is away is tried again by whatever needs it."""
        await self.sessions.start()

    async def keep_up(self) -> None:
        """Ends what is over, sees what has changed, for as long as it runs."""
        watching = asyncio.create_task(self.versions.keep_up(self.settings.reload_seconds))
        try:
            await self._keep_up()
        finally:
            watching.cancel()

    async def _keep_up(self) -> None:
        written = time.monotonic()
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self.settings.session_idle_seconds))
            self.sessions.sweep()
            self.versions.sweep()
            if self.keys is not None:
                self.keys.keep_up()
            if self.snapshots is not None:
                await self._resume(self.snapshots)
            if self.snapshots is not None and time.monotonic() - written >= self.settings.snapshot_seconds:
                try:
                    await self._write(self.snapshots)
                except OSError as error:
                    log.error("the snapshot could not be written, the last one stays: %s", error)
                written = time.monotonic()
            self.metrics.keep_up()

    async def _resume(self, snapshots: Snapshots) -> None:
        with suppress(BadSnapshot, ServerFull):  # then they wait for longer
            await snapshots.resume(self.versions.holding)

    async def close(self) -> None:
        """Writes the last snapshot, and stops what runs beside the event loop."""
        self.ready = False
        self.versions.close()
        self._executor.shutdown()
        if self.snapshots is not None:
            try:
                await self._write(self.snapshots)
            except OSError as error:
                log.error("the snapshot could not be written, changes since the last one are lost: %s", error)
                self.exit_status = 1
            self.snapshots.close()
        await self.sessions.close()
        self.metrics.keep_up()
        if self.tracing is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.tracing.close)

    async def _write(self, snapshots: Snapshots) -> None:
        start = time.monotonic()
        try:
            await snapshots.write()
        except OSError:
            self.counts.snapshot_errors += 1
            raise
        self.counts.snapshots.note(time.monotonic() - start)
