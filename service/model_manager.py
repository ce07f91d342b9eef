"""Loaded model versions, one engine each: new sessions go to the newest; older versions drain."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar

from cellserve.models.signature import Signature, StateSpec, TensorSpec
from cellserve.service.engine.engine import Engine
from cellserve.service.errors import RepositoryUnusable, ServerFull, UnknownModel, VersionLoading
from cellserve.service.model_repository.errors import BrokenModel, Stopping
from cellserve.service.model_repository.model import Model, VersionKey
from cellserve.service.model_repository.repository import Repository, run_failure
from cellserve.service.runtime.providers import RuntimeUnavailable
from cellserve.service.sessions.table import SessionTable

T = TypeVar("T")
State = Literal["serving", "draining", "loaded", "available", "refused"]
Engines = dict[VersionKey, Engine]

_KEPT_SECONDS = 60.0  # how long a version stays loaded after a request for its number

log = logging.getLogger("cellserve")


class VersionState(NamedTuple):
    """The state of one version."""

    key: VersionKey
    state: State
    sessions: int  # sessions that have slots here
    reason: str  # why it is refused, or what is wrong with its files while it is loaded; empty if nothing


class ModelManager:
    """Loads and unloads model versions while others are served.

    Slow work (reading files, opening models, checking batch invariance) runs on a thread, one job at a time; its
    results are installed by the event loop.

    Args:
        repository: The model repository.
        make_engine: Creates the engine of a model; called on the thread.
        table: The sessions.
        max_old: Versions loaded on request beside the newest ones, at most.
        thread: One thread for slow work.
        clock: Returns seconds.

    Raises:
        BrokenModel: There is no model to serve.
        RuntimeUnavailable: The requested provider is not available.
    """

    def __init__(
        self,
        repository: Repository,
        make_engine: Callable[[Model], Engine],
        table: SessionTable,
        max_old: int,
        thread: ThreadPoolExecutor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.repository = repository
        self.loaded: Engines = {}
        self.newest: dict[str, Engine] = {}  # engine of new sessions and whole sequences, by model name
        self._make_engine, self._table, self._max_old = make_engine, table, max_old
        self._thread, self._clock = thread, clock
        self._last_requested: dict[VersionKey, float] = {}  # when a version was last requested by its number
        self._loading: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._unloading: list[Engine] = []  # retired engines; a pending request may still hold one
        self._busy = asyncio.Lock()  # held while the thread is working
        self._last_logged_error = ""
        self._install(*self._rescan(False, False))
        if not self.newest:
            raise BrokenModel(f"no model in {repository.folder}/ can be served: the log says what is wrong with each")

    def resolve(self, model: str | None) -> Engine:
        """Returns the engine for None (the only model), NAME (its newest version), or NAME:VERSION.

        Raises:
            UnknownModel: There is no such model, or no name was given and several models are served.
            VersionLoading: The version is not loaded; loading has started, and `loading` waits for it.
        """
        if model is None:
            if len(self.newest) == 1:
                return next(iter(self.newest.values()))
            raise UnknownModel(f"model: missing, but several are served: send one of {', '.join(self.newest)}")
        if model in self.newest:
            return self.newest[model]
        key = VersionKey.parse(model)
        version = None if key is None else self.repository.versions.get(key)
        engine = None if key is None else self.loaded.get(key)
        if key is not None:
            if engine is not None and (engine is self.newest.get(key.name) or (version and not version.refused)):
                self._last_requested[key] = self._clock()
                return engine
            if version is not None and not version.refused:
                self._start_loading(key)
                raise VersionLoading(key)
            if version is not None:
                raise UnknownModel(f"model: {key} is refused: {version.refused}")
        if engine is not None:
            raise UnknownModel(f"model: {key} was removed from the repository: it only serves existing sessions")
        name, _, number = model.partition(":")
        there = [
            one.key.version for one in self.repository.versions.values() if one.key.name == name and not one.refused
        ]
        if there:
            raise UnknownModel(
                f"model: {name!r} has no version {number[:20]!r}: send one of {', '.join(map(str, sorted(there)))}"
            )
        raise UnknownModel(
            f"model: there is no model {model[:80]!r}: send one of {', '.join(self.newest)}, or NAME:VERSION"
        )

    async def get(self, model: str | None) -> Engine:
        """Returns what `resolve` returns, after waiting for it to load if necessary."""
        while True:
            try:
                return self.resolve(model)
            except VersionLoading as loading:
                await self.loading(loading.key)

    async def loading(self, key: tuple[str, int]) -> None:
        """Waits until a version that `resolve` has started to load is loaded or refused.

        Raises:
            ServerFull: The limit on old versions is reached.
        """
        if key in self._loading:
            await asyncio.shield(self._loading[key])

    async def engine_for_digest(self, key: VersionKey, digest: str) -> Engine | None:
        """Returns the engine of the version whose model file has this digest, after loading it if necessary.

        Args:
            key: The preferred version, if several have the same file.
            digest: SHA-256 of the file.

        Raises:
            ServerFull: The limit on old versions is reached.
        """
        found = self._loaded_with(key, digest)
        if found is None:
            wanted = self._in_folder_with(key, digest)
            if wanted is not None:
                await asyncio.shield(self._start_loading(wanted))
            found = self._loaded_with(key, digest)
        return found

    async def reload(self, again: bool = False) -> None:
        """Rescans the folder, and loads and installs what is new.

        Args:
            again: Also inspect refused versions whose files have not changed.

        Raises:
            RepositoryUnusable: The folder cannot be read, or is empty; nothing changes.
        """
        async with self._busy:
            try:
                self._install(*await self._in_thread(lambda: self._rescan(again, True)))
                self._last_logged_error = ""
            except BrokenModel as broken:
                if str(broken) != self._last_logged_error:
                    log.error("the models stay as they are: %s", broken)
                self._last_logged_error = str(broken)
                raise RepositoryUnusable(
                    "the models stay as they are: their folder cannot be read, or has none: the server's log says more"
                ) from None

    async def watch(self, seconds: float) -> None:
        """Reloads at this interval until it is cancelled; returns at once if the interval is 0."""
        while seconds:
            await asyncio.sleep(seconds)
            try:
                await self.reload()
            except RepositoryUnusable:
                pass
            except Exception as error:
                log.error("the models could not be reloaded", exc_info=error)

    def sweep(self) -> None:
        """Unloads the versions that nobody uses any more."""
        if self._busy.locked():
            return  # the thread relies on the set of loaded versions
        # A request that resolved an engine just before it was retired has allocated its slots by now.
        for engine in [engine for engine in self._unloading if engine.is_idle]:
            self._unloading.remove(engine)
            self._thread.submit(engine.close)  # freeing much memory is slow too
        serving, kept = set(self.newest.values()), self._clock() - _KEPT_SECONDS
        for key, engine in list(self.loaded.items()):
            if engine not in serving and engine.is_idle and self._last_requested.get(key, kept) <= kept:
                del self.loaded[key]
                self._last_requested.pop(key, None)
                self._table.unregister(engine)
                self.repository.mark_closed(key)
                self._unloading.append(engine)
                log.info("%s version %s is unloaded: it has no more sessions", *key)

    def states(self) -> dict[str, list[VersionState]]:
        """Returns the state of each version by model name, newest first."""
        states: dict[str, list[VersionState]] = {}
        for key in sorted({*self.loaded, *self.repository.versions}, key=lambda key: (key.name, -key.version)):
            engine, version = self.loaded.get(key), self.repository.versions.get(key)
            reason = "it was removed from the folder" if version is None else version.refused
            sessions = 0 if engine is None else len(self._table.by_slot[engine])
            state: State = "refused" if reason else "available"
            if engine is not None:
                serves = engine is self.newest.get(key.name)
                state = "serving" if serves else "draining" if sessions else "loaded"
            states.setdefault(key.name, []).append(VersionState(key, state, sessions, reason))
        return states

    def close(self) -> None:
        """Stops accepting loads."""
        self.repository.trial.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _rescan(self, again: bool, started: bool) -> tuple[Engines, dict[str, Engine]]:
        """Rescans the folder; returns the engines that were created, and the newest engine of each name.

        That is the newest version that can be served. If none can, the current one stays: a broken version never
        replaces a working one.
        """
        self.repository.scan(again)
        fresh: Engines = {}
        newest: dict[str, Engine] = {}
        for name, versions in self.repository.by_name().items():
            serving = self.newest.get(name)
            for version in versions:
                engine = self.loaded.get(version.key)
                if engine is None or (version.refused and engine is not serving):
                    opened = {} if version.refused else self._open(version.key, started)
                    fresh |= opened
                    engine = opened.get(version.key)
                if engine is not None:
                    newest[name] = engine
                    break
            else:
                if serving is not None:
                    newest[name] = serving
        return fresh, newest

    def _open(self, key: VersionKey, started: bool) -> Engines:
        """Opens a version; returns its engine under its key, or nothing if it is refused or the server stops.

        Args:
            key: The version.
            started: Whether others are served already.
        """
        try:
            return {key: self._make_engine(self.repository.open(key, started))}
        except (BrokenModel, Stopping):
            return {}
        except RuntimeUnavailable as error:
            if not self.newest:
                raise
            self.repository.refuse(key, str(error))
        except Exception as error:
            self.repository.refuse(key, run_failure(error))
        return {}

    def _install(self, fresh: Engines, newest: dict[str, Engine]) -> None:
        """Installs engines, and makes each name refer to its newest one."""
        for key, engine in fresh.items():
            self.loaded[key] = engine
            self._table.register(engine)
        for name, engine in newest.items():
            before = self.newest.get(name)
            if before is not None and before is not engine:
                log.info(
                    "%s version %s serves new sessions now, instead of %s", *engine.model.key, before.model.version
                )
                other = "; ".join(_differences(before.model.document.signature, engine.model.document.signature))
                if other:
                    numbers = engine.model.version, before.model.version
                    log.warning("%s version %s has a different signature from %s: %s", name, *numbers, other)
        for name in self.newest.keys() - newest.keys():
            log.info("%s is not served any more: it was removed from the folder", name)
        newest = dict(newest)
        self.newest.clear()  # in place, since requests look their model up in this very dictionary
        self.newest.update(newest)

    def _start_loading(self, key: VersionKey) -> asyncio.Task[None]:
        """Starts loading a version, which continues even if nobody waits for it."""
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.get_running_loop().create_task(self._load(key))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            task.add_done_callback(lambda task: self._loading.pop(key))
        return task

    async def _load(self, key: VersionKey) -> None:
        async with self._busy:
            if key in self.loaded:
                return
            if len(self.loaded) - len(self.newest) >= self._max_old:
                raise ServerFull(
                    f"{self._max_old} old model versions are loaded, which is the limit, so {key} cannot be loaded: "
                    f"try again when one of them has no more sessions"
                )
            fresh = await self._in_thread(lambda: self._open(key, True))
            self._install(fresh, self.newest)
            self._last_requested[key] = self._clock()

    def _loaded_with(self, key: VersionKey, digest: str) -> Engine | None:
        named = self.loaded.get(key)
        if named is not None and named.model.digest == digest:
            return named
        return next((engine for engine in self.loaded.values() if engine.model.digest == digest), None)

    def _in_folder_with(self, key: VersionKey, digest: str) -> VersionKey | None:
        keys = [one.key for one in self.repository.versions.values() if one.digest == digest and not one.refused]
        return key if key in keys else keys[0] if keys else None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _differences(old: Signature, new: Signature) -> Iterator[str]:
    """Yields the differences between the inputs, outputs and states of two versions."""
    for kind in ("inputs", "outputs", "states"):
        before, after = _describe_specs(getattr(old, kind)), _describe_specs(getattr(new, kind))
        if before != after:
            yield f"{kind} {after}, before {before}"


def _describe_specs(specs: Sequence[TensorSpec | StateSpec]) -> str:
    within = {spec.name: f" {list(spec.bounds)}" for spec in specs if isinstance(spec, TensorSpec) and spec.bounds}
    texts = (f"{spec.name} {list(spec.shape)} {spec.dtype}{within.get(spec.name, '')}" for spec in specs)
    return ", ".join(texts) or "none"
