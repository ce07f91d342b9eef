"""The versions that are loaded, an engine each: the newest of a model serves what is new, others what they began."""

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
from cellserve.service.model_repository.repository import BrokenModel, Model, Repository, VersionKey, cannot_be_run
from cellserve.service.runtime.onnx_model import RuntimeUnavailable
from cellserve.service.sessions.table import SessionTable

T = TypeVar("T")
State = Literal["serving", "draining", "loaded", "available", "refused"]
Engines = dict[VersionKey, Engine]

_KEPT_SECONDS = 60.0  # a version that was asked for by its number stays loaded for so long

log = logging.getLogger("cellserve")


class VersionState(NamedTuple):
    """How one version stands."""

    key: VersionKey
    state: State
    sessions: int  # that have slots here
    reason: str  # why it is refused, or what is wrong with its files while it is loaded


class Versions:
    """Loads and unloads versions of models while others are served.

    What takes long (files, opening, the proof of exactness) is done on a thread of its own, one thing at a time; what
    has come of it is put in place between two turns of the event loop.

    Args:
        repository: Where they are.
        make: Makes the engine of a model; called on the thread.
        table: The sessions.
        most_old: Versions loaded beside the newest ones because somebody asked for them, at most.
        thread: One thread for what takes long.
        clock: Gives seconds.

    Raises:
        BrokenModel: There is no model to serve.
        RuntimeUnavailable: The provider that was asked for is not to be had.
    """

    def __init__(
        self,
        repository: Repository,
        make: Callable[[Model], Engine],
        table: SessionTable,
        most_old: int,
        thread: ThreadPoolExecutor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.repository = repository
        self.loaded: Engines = {}
        self.newest: dict[str, Engine] = {}  # what serves new sessions and whole sequences, by the model's name
        self._make, self._table, self._most_old, self._thread, self._clock = make, table, most_old, thread, clock
        self._asked: dict[VersionKey, float] = {}  # when a version was last asked for by its number
        self._loading: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._leaving: list[Engine] = []  # unloaded, but for a request that may have looked one up a moment ago
        self._busy = asyncio.Lock()  # held while the thread is at work
        self._told = ""
        self._put(*self._look(False))
        if not self.newest:
            raise BrokenModel(f"there is no sound model in {repository.folder}/: the log tells what is wrong with each")

    def named(self, model: str | None) -> Engine:
        """Gives the engine that is meant by nothing, a model's name, or `NAME:VERSION`.

        Raises:
            UnknownModel: There is none, or nothing was said and several models are served.
            VersionLoading: It has to be loaded, which has begun: `loading` waits for it.
        """
        if model is None:
            if len(self.newest) == 1:
                return next(iter(self.newest.values()))
            raise UnknownModel(f"model: missing, and several are served: send one of {', '.join(self.newest)}")
        if model in self.newest:
            return self.newest[model]
        key = VersionKey.parse(model)
        version = None if key is None else self.repository.versions.get(key)
        engine = None if key is None else self.loaded.get(key)
        if key is not None:
            if engine is not None and (engine is self.newest.get(key.name) or (version and not version.refused)):
                self._asked[key] = self._clock()
                return engine
            if version is not None and not version.refused:
                self._begin(key)
                raise VersionLoading(key)
            if version is not None:
                raise UnknownModel(f"model: {key} is refused: {version.refused}")
        if engine is not None:
            raise UnknownModel(
                f"model: {key} is not in the folder any more: it serves the sessions that it has, no others"
            )
        name, _, number = model.partition(":")
        there = [
            one.key.version for one in self.repository.versions.values() if one.key.name == name and not one.refused
        ]
        if there:
            raise UnknownModel(
                f"model: {name!r} has no version {number[:20]!r}: it has version {', '.join(map(str, sorted(there)))}"
            )
        raise UnknownModel(
            f"model: there is none named {model[:80]!r}: send one of {', '.join(self.newest)}, or NAME:VERSION"
        )

    async def get(self, model: str | None) -> Engine:
        """Gives what `named` gives, and waits where it has to be loaded."""
        while True:
            try:
                return self.named(model)
            except VersionLoading as loading:
                await self.loading(loading.key)

    async def loading(self, key: tuple[str, int]) -> None:
        """Waits until what `named` has begun to load is loaded or refused.

        Raises:
            ServerFull: As many old versions are loaded as may be.
        """
        if key in self._loading:
            await asyncio.shield(self._loading[key])

    async def holding(self, key: VersionKey, digest: str) -> Engine | None:
        """Gives the engine of the version whose model file has a digest, loaded where it has to be.

        Args:
            key: What it was called where somebody began with it; another may have the same file.
            digest: SHA-256 of the file.

        Raises:
            ServerFull: As many old versions are loaded as may be.
        """
        found = self._loaded_with(key, digest)
        if found is None:
            wanted = self._in_folder_with(key, digest)
            if wanted is not None:
                await asyncio.shield(self._begin(wanted))
            found = self._loaded_with(key, digest)
        return found

    def held_at_once(self, key: VersionKey, digest: str) -> Engine | None:
        """Gives what `holding` gives, without an event loop: before anything is served."""
        wanted = None if self._loaded_with(key, digest) else self._in_folder_with(key, digest)
        if wanted is not None:
            self._put(self._opened(wanted), self.newest)
        return self._loaded_with(key, digest)

    async def reload(self, again: bool = False) -> None:
        """Looks the folder over, loads what is new and puts it in place.

        Args:
            again: Whether to look again at what was refused, though its files are as they were.

        Raises:
            RepositoryUnusable: The folder cannot be read, or is empty; all stays as it was.
        """
        async with self._busy:
            try:
                self._put(*await self._beside(lambda: self._look(again)))
                self._told = ""
            except BrokenModel as broken:
                if str(broken) != self._told:
                    log.error("the models stay as they are: %s", broken)
                self._told = str(broken)
                raise RepositoryUnusable(f"the models stay as they are: {broken}") from None

    async def keep_up(self, seconds: float) -> None:
        """Reloads every so many seconds, for as long as it runs; never where they are 0."""
        while seconds:
            await asyncio.sleep(seconds)
            try:
                await self.reload()
            except RepositoryUnusable:
                pass
            except Exception as error:
                log.error("the models could not be reloaded", exc_info=error)

    def sweep(self) -> None:
        """Unloads the versions that nobody needs any more."""
        if self._busy.locked():
            return  # what the thread comes to refers to what is loaded
        # Whoever had looked an engine up in the turn in which it was dismissed has its slots by now.
        for engine in [engine for engine in self._leaving if engine.is_idle]:
            self._leaving.remove(engine)
            self._thread.submit(engine.close)  # to give much memory back takes long too
        serving, kept = set(self.newest.values()), self._clock() - _KEPT_SECONDS
        for key, engine in list(self.loaded.items()):
            if engine not in serving and engine.is_idle and self._asked.get(key, kept) <= kept:
                del self.loaded[key]
                self._asked.pop(key, None)
                self._table.unregister(engine)
                self.repository.closed(key)
                self._leaving.append(engine)
                log.info("%s version %s is unloaded: it has no sessions any more", *key)

    def states(self) -> dict[str, list[VersionState]]:
        """Gives by name how each version stands, the newest first."""
        states: dict[str, list[VersionState]] = {}
        for key in sorted({*self.loaded, *self.repository.versions}, key=lambda key: (key.name, -key.version)):
            engine, version = self.loaded.get(key), self.repository.versions.get(key)
            reason = "it is not in the folder any more" if version is None else version.refused
            sessions = 0 if engine is None else len(self._table.by_slot[engine])
            state: State = "refused" if reason else "available"
            if engine is not None:
                serves = engine is self.newest.get(key.name)
                state = "serving" if serves else "draining" if sessions else "loaded"
            states.setdefault(key.name, []).append(VersionState(key, state, sessions, reason))
        return states

    def close(self) -> None:
        """Begins nothing any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _look(self, again: bool) -> tuple[Engines, dict[str, Engine]]:
        """Looks the folder over; gives the engines that it had to make, and which serve what is new.

        Of each name that is the newest sound version. Where none is sound, what has served stays: nothing broken takes
        the place of something good.
        """
        self.repository.scan(again)
        fresh: Engines = {}
        newest: dict[str, Engine] = {}
        for name, versions in self.repository.by_name().items():
            serving = self.newest.get(name)
            for version in versions:
                engine = self.loaded.get(version.key)
                if engine is None or (version.refused and engine is not serving):
                    opened = {} if version.refused else self._opened(version.key)
                    fresh |= opened
                    engine = opened.get(version.key)
                if engine is not None:
                    newest[name] = engine
                    break
            else:
                if serving is not None:
                    newest[name] = serving
        return fresh, newest

    def _opened(self, key: VersionKey) -> Engines:
        """Opens a version; gives its engine under its key, or nothing where it is refused."""
        try:
            return {key: self._make(self.repository.open(key))}
        except BrokenModel:
            return {}
        except RuntimeUnavailable as error:
            if not self.newest:
                raise
            self.repository.refuse(key, str(error))
        except Exception as error:
            self.repository.refuse(key, cannot_be_run(error))
        return {}

    def _put(self, fresh: Engines, newest: dict[str, Engine]) -> None:
        """Takes engines into service, and lets each name mean what it should from now on."""
        for key, engine in fresh.items():
            self.loaded[key] = engine
            self._table.register(engine)
        for name, engine in newest.items():
            before = self.newest.get(name)
            if before is not None and before is not engine:
                log.info("%s version %s serves from now on, in place of %s", *engine.model.key, before.model.version)
                other = "; ".join(_differs(before.model.document.signature, engine.model.document.signature))
                if other:
                    numbers = engine.model.version, before.model.version
                    log.warning("%s version %s has another signature than %s: %s", name, *numbers, other)
        for name in self.newest.keys() - newest.keys():
            log.info("%s is not served any more: it is not in the folder", name)
        newest = dict(newest)
        self.newest.clear()  # in place: it is what requests look their model up in
        self.newest.update(newest)

    def _begin(self, key: VersionKey) -> asyncio.Task[None]:
        """Loads a version, for whoever waits for it and though nobody does."""
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
            if len(self.loaded) - len(self.newest) >= self._most_old:
                raise ServerFull(
                    f"{self._most_old} old versions of models are loaded, as many as may be, and {key} would be one "
                    f"more: try again when one of them has no sessions any more"
                )
            fresh = await self._beside(lambda: self._opened(key))
            self._put(fresh, self.newest)
            self._asked[key] = self._clock()

    def _loaded_with(self, key: VersionKey, digest: str) -> Engine | None:
        named = self.loaded.get(key)
        if named is not None and named.model.digest == digest:
            return named
        return next((engine for engine in self.loaded.values() if engine.model.digest == digest), None)

    def _in_folder_with(self, key: VersionKey, digest: str) -> VersionKey | None:
        keys = [one.key for one in self.repository.versions.values() if one.digest == digest and not one.refused]
        return key if key in keys else keys[0] if keys else None

    async def _beside(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _differs(old: Signature, new: Signature) -> Iterator[str]:
    """Says which of the inputs, outputs and states of two versions are not the same."""
    for kind in ("inputs", "outputs", "states"):
        before, after = _listed(getattr(old, kind)), _listed(getattr(new, kind))
        if before != after:
            yield f"{kind} {after}, before {before}"


def _listed(specs: Sequence[TensorSpec | StateSpec]) -> str:
    within = {spec.name: f" {list(spec.bounds)}" for spec in specs if isinstance(spec, TensorSpec) and spec.bounds}
    told = (f"{spec.name} {list(spec.shape)} {spec.dtype}{within.get(spec.name, '')}" for spec in specs)
    return ", ".join(told) or "none"
