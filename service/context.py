"""What all surfaces share: settings, models with their engines, sessions, counters and keys."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from cellserve.service.access.keys import HeldKey, Keys
from cellserve.service.access.peer_address import Address
from cellserve.service.engine.engine import Engine
from cellserve.service.engine.memory import MemoryTrimmer
from cellserve.service.errors import NotAnOperator, Unauthorized
from cellserve.service.model_manager import ModelManager
from cellserve.service.model_repository.model import Model
from cellserve.service.model_repository.repository import Repository
from cellserve.service.observability.counters import Counts
from cellserve.service.observability.prometheus import Metrics
from cellserve.service.runtime.onnx_model import RuntimeOptions
from cellserve.service.runtime.providers import flush_denormals
from cellserve.service.sessions.rollout import RolloutRunner
from cellserve.service.sessions.session import ClientLimits
from cellserve.service.sessions.stores.memory import MemoryStore
from cellserve.service.sessions.stores.protocol import SessionStore
from cellserve.service.sessions.table import SessionTable
from cellserve.service.sessions.writer import SessionWriter
from cellserve.service.settings import Settings
from cellserve.service.validation.decoding import Decoding

if TYPE_CHECKING:
    from cellserve.service.observability.tracing import Tracing
    from cellserve.service.sessions.stores.redis_client import RedisClient

Headers = Iterable[tuple[bytes, bytes]]

_NICE = 10
_LMDB = "lmdb:"
_SWEEP_SECONDS = 1.0
_ENDED_AT_ONCE = 8  # connections of revoked keys in one iteration of the event loop: a few milliseconds
_KEYS_SECONDS = 0.25  # between looks at the file of keys: a revoked key's connections end within a second


def _lower_priority() -> None:
    """Lowers the priority of the tick thread: where it shares a core with the event loop, the loop goes first."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _store(settings: Settings, table: SessionTable, versions: ModelManager) -> SessionStore:
    bounds = settings.max_sessions, settings.when_full
    limits = ClientLimits(settings.max_sessions_per_owner, settings.max_session_bytes_per_owner)
    if settings.store == "memory":
        return MemoryStore(table, settings.max_sessions, settings.tombstone_seconds, settings.when_full, limits)
    # Here and not above: the packages are extras.
    if settings.store.startswith(_LMDB):
        from cellserve.service.sessions.stores.lmdb.folder import Folder
        from cellserve.service.sessions.stores.lmdb.store import LmdbStore
        from cellserve.service.sessions.stores.lmdb.store_client import LmdbClient

        folder = Folder(
            Path(settings.store.removeprefix(_LMDB)),
            settings.store_max_bytes,
            settings.store_sync == "always",
            settings.store_checkpoint_seconds,
            settings.workers,
        )
        embedded = LmdbClient(
            folder, settings.session_idle_seconds, settings.tombstone_seconds, settings.store_max_bytes
        )
        return LmdbStore(embedded, table, settings.arena_sessions, *bounds, versions.engine_for_digest, limits)
    from cellserve.service.sessions.stores.shared import SharedStore

    return SharedStore(_redis(settings), table, settings.arena_sessions, *bounds, versions.engine_for_digest, limits)


def _redis(settings: Settings) -> RedisClient:
    from cellserve.service.sessions.stores.redis_client import RedisClient

    times = settings.session_idle_seconds, settings.tombstone_seconds, settings.store_timeout_seconds
    return RedisClient(settings.store, *times, settings.store_replicas)


async def check_store(settings: Settings) -> None:
    """Tries the shared store before anything is loaded; one that cannot be reached now is tried again when needed.

    Raises:
        StoreUnusable: It will not do, unless its settings or ours are changed.
    """
    if settings.store != "memory" and not settings.store.startswith(_LMDB):
        client = _redis(settings)
        try:
            await client.check()
        finally:
            await client.close()


def _tracing(settings: Settings) -> Tracing | None:
    if not settings.tracing:
        return None
    # Here and not above: the package is an extra.
    from cellserve.service.observability.tracing import Tracing

    return Tracing()


def _authorization(headers: Headers) -> bytes | None:
    """Returns the `Authorization` header, if there is one; raises Unauthorized if there are several."""
    found = [value for name, value in headers if name == b"authorization"]
    if len(found) > 1:
        raise Unauthorized("the request has several Authorization headers: send one")
    return found[0] if found else None


class ServiceContext:
    """The service of one process.

    Args:
        settings: Its settings.

    Raises:
        BrokenModel: There is no model to serve.
        RuntimeUnavailable: The requested provider is not available.
        BadKeysFile: The file of API keys cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        flush_denormals()
        options = RuntimeOptions(
            settings.provider,
            settings.threads,
            settings.spinning,
            settings.memory_arena,
            settings.optimization,
            settings.when_inexact,
            settings.precision,
            settings.cuda_tf32,
            settings.state_memory,
        )
        self._executor = ThreadPoolExecutor(1, "tick", _lower_priority)
        table = SessionTable(settings.session_idle_seconds)
        self.tracing = _tracing(settings)
        self.versions = ModelManager(
            Repository(settings.models, options, settings.max_batch, settings.max_model_bytes),
            self._engine_of,
            table,
            settings.max_old_versions,
            # At normal priority: loading mostly holds the GIL. On a busy machine, a thread of lower priority that held
            # the GIL without running blocked the event loop for up to 110 ms; at equal priority it was 29 ms.
            ThreadPoolExecutor(1, "load"),
        )
        self.engines = self.versions.newest
        self.sessions = _store(settings, table, self.versions)
        self.writer = SessionWriter(self.sessions)
        self.decoding = Decoding()
        self.rollouts = RolloutRunner(self.writer)
        self.counts = Counts()
        self.metrics = Metrics(
            self.counts, lambda: self.versions.loaded.values(), self.sessions, self.writer, settings.workers
        )
        self.observes_each_request = settings.access_log or settings.tracing  # then without the fast path
        self.keys = None if settings.api_keys_file is None else Keys(settings.api_keys_file)
        self._memory = MemoryTrimmer()
        self.started = False  # whether requests are taken: after the start, and before the end
        self.stopping = False  # whether the server shuts down: connections should close as soon as possible

    def _engine_of(self, model: Model) -> Engine:
        return Engine(model, self.settings, self._executor, self.tracing)

    @property
    def ready(self) -> bool:
        """Whether requests are taken, and models can be run on them."""
        return self.started and not any(one.model.runtime.lost_device for one in self.versions.loaded.values())

    def owner(self, headers: Headers, client: Address) -> str:
        """Returns the owner whose key is in a request's headers, empty if no keys are needed.

        Args:
            headers: The headers, with their names in lower case.
            client: The client's address.

        Raises:
            Unauthorized: There is no key, or an unknown one.
            TooManyWrongKeys: The address has sent too many wrong keys.
        """
        if self.keys is None:
            return ""
        return self.keys.owner(_authorization(headers), client[0] if client else "")

    def known_owner(self, headers: Headers, client: Address) -> str:
        """Returns what `owner` returns if the key is in use, and counts no wrong keys; raises Unauthorized."""
        if self.keys is None:
            return ""
        return self.keys.known(_authorization(headers), client[0] if client else "")

    def holding_key(
        self, headers: Headers, owner: str, end: Callable[[Unauthorized], object]
    ) -> AbstractContextManager[HeldKey | None]:
        """Calls `end` when the owner's key in a request's headers is revoked, within the context."""
        if self.keys is None:
            return nullcontext()
        return self.keys.held(_authorization(headers), owner, end)

    @asynccontextmanager
    async def while_key_valid(self, headers: Headers, owner: str) -> AsyncIterator[HeldKey | None]:
        """Cancels what runs in the context when the owner's key in a request's headers is revoked.

        Raises:
            Unauthorized: The key was revoked.
        """
        revoked: list[Unauthorized] = []

        def end(problem: Unauthorized) -> None:
            revoked.append(problem)
            limit.reschedule(0)

        try:
            async with asyncio.timeout(None) as limit:
                with self.holding_key(headers, owner, end) as held:
                    yield held
        except TimeoutError:
            if not limit.expired():
                raise
            raise revoked.pop() from None  # it refers to this frame, which must not refer to it

    def operator(self, headers: Headers, client: Address) -> str:
        """Returns the operator whose key is in a request's headers, empty if no keys are needed.

        Raises:
            Unauthorized: There is no key, or an unknown one.
            TooManyWrongKeys: The address has sent too many wrong keys.
            NotAnOperator: The key's owner is not one of the setting `operators`.
        """
        owner = self.owner(headers, client)
        if self.keys is not None and owner not in map(str.strip, self.settings.operators.split(",")):
            raise NotAnOperator(
                f"the key belongs to {owner!r}, who is not an operator: send the key of an owner in --operators, "
                f"or use the port of --operations-port"
            )
        return owner

    def engine(self, model: str | None) -> Engine:
        """Returns the engine of a model's newest version, or of the version `NAME:VERSION`.

        Args:
            model: The name; None means the only model.

        Raises:
            UnknownModel: There is no such model or version.
            VersionLoading: The version is not loaded: `engine_when_loaded` loads it.
        """
        engine = self.engines.get(model)  # type: ignore[arg-type]
        return self.versions.resolve(model) if engine is None else engine

    async def engine_when_loaded(self, model: str | None) -> Engine:
        """Returns what `engine` returns, after loading the version if necessary."""
        return await self.versions.get(model)

    async def start(self) -> None:
        """Checks the session store; an unreachable one is tried again by each request that needs it."""
        await self.sessions.start()

    async def run_housekeeping(self) -> None:
        """Expires sessions, reloads keys and models, and writes metrics, until it is cancelled."""
        watching = [asyncio.create_task(self.versions.watch(self.settings.reload_seconds))]
        if self.keys is not None:
            watching.append(asyncio.create_task(self._watch(self.keys)))
        try:
            await self._sweep_periodically()
        finally:
            for task in watching:
                task.cancel()

    async def _watch(self, keys: Keys) -> None:
        while True:
            await asyncio.sleep(_KEYS_SECONDS)
            keys.reload_if_changed()
            while keys.end_revoked(_ENDED_AT_ONCE):
                await asyncio.sleep(0)

    async def _sweep_periodically(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self.settings.session_idle_seconds))
            self.sessions.sweep()
            self.versions.sweep()
            await self._memory.sweep([engine.arena for engine in self.versions.loaded.values()])
            await self.metrics.publish()

    async def close(self) -> None:
        """Stops all threads and connections."""
        self.started = False
        self.decoding.close()
        self.versions.close()
        self._executor.shutdown()
        await self.metrics.publish()  # which reads the store
        await self.sessions.close()
        if self.tracing is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.tracing.close)
