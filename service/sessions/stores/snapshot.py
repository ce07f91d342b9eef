"""The snapshot: all sessions of a process in one file, written whole or not at all, and checked before it is believed.

The file: a line that names the format, a safetensors document, and the SHA-256 of both. The document has, for each
model, its sessions' positions, times and states, one row a session, and as JSON what else there is of them.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors.numpy import load, save

from cellserve.service.engine.engine import Engine
from cellserve.service.idempotency import Applied, Request
from cellserve.service.model_repository.repository import VersionKey
from cellserve.service.sessions.session import Session, key_of
from cellserve.service.sessions.stores.memory import MemoryStore, Tombstone
from cellserve.service.sessions.table import SessionTable

Array = NDArray[Any]

_MAGIC = b"cellserve sessions 1\n"
_ROWS = 2048  # sessions that are copied in one turn of the event loop

log = logging.getLogger("cellserve")


class BadSnapshot(Exception):
    """The file is not a snapshot that can be restored; the message says why. It is left as it is."""


@dataclass
class _Part:
    """The sessions of one model."""

    told: dict[str, Any]  # model, version, digest
    sessions: list[list[Any]] = field(default_factory=list)  # owner, id, origin, applied
    arrays: dict[str, list[Array]] = field(default_factory=dict)

    def tensors(self, place: int) -> dict[str, Array]:
        """Gives its tensors, named for the document."""
        return {f"{place}/{name}": np.concatenate(rows) for name, rows in self.arrays.items()}


class Snapshots:
    """Writes a table's sessions to a file, and reads them back.

    Args:
        path: The file; beside it a lock keeps other processes from using it too.
        store: The sessions.
        engines: Of the versions that are loaded.
        find: Gives the engine of a version by its name and digest, loaded where it has to be.

    Raises:
        BadSnapshot: Another process uses the file, or it cannot be written there.
    """

    def __init__(
        self,
        path: Path,
        store: MemoryStore,
        engines: Callable[[], list[Engine]],
        find: Callable[[VersionKey, str], Engine | None],
    ) -> None:
        self._path, self._store, self._engines, self._find = path, store, engines, find
        self._table = store.table
        self._kept: list[tuple[_Part, dict[str, Array]]] = []  # of versions that are not here
        self._lock = _locked(path)
        self._saving = threading.Lock()

    def restore(self) -> int:
        """Fills the table from the file, where there is one; gives the number of sessions.

        Raises:
            BadSnapshot: The file is damaged or something else; then nothing is ever written over it.
        """
        if not self._path.exists():
            return 0
        document = _read(self._path)
        told = orjson.loads(document.pop("told").tobytes())
        table, now = self._table, self._table.clock() - time.time()
        count = 0
        for place, part in enumerate(told["models"]):
            arrays = {name: document[f"{place}/{name}"] for name in part["arrays"]}
            engine = self._find(VersionKey(part["model"], part["version"]), part["digest"])
            if engine is None:
                kept = _Part({key: part[key] for key in ("model", "version", "digest")}, part["sessions"])
                self._kept.append((kept, arrays))
                waiting = f"{part['model']!r}, version {part['version']}"
                self._store.waiting |= {key_of(owner, name): waiting for owner, name, *_ in part["sessions"]}
                log.error(
                    "%d sessions of model %s version %s wait in the snapshot: that version is not here",
                    len(part["sessions"]), part["model"], part["version"],
                )  # fmt: skip
                continue
            count += _fill(table, engine, part["sessions"], arrays, now)
        for key, reason, position, until in told["gone"]:
            self._store.tombstones[key] = Tombstone(reason, position, until + now)
        return count

    async def resume(self, find: Callable[[VersionKey, str], Awaitable[Engine | None]]) -> None:
        """Fills the table with the sessions that have waited for a version which is here by now; not during a write.

        Args:
            find: Gives the engine of a version by its name and digest, loaded where it has to be.
        """
        for kept in list(self._kept):
            part, arrays = kept
            key = VersionKey(part.told["model"], part.told["version"])
            engine = await find(key, part.told["digest"])
            if engine is not None:
                _fill(self._table, engine, part.sessions, arrays, self._table.clock() - time.time())
                self._kept.remove(kept)
                for owner, name, *_ in part.sessions:
                    del self._store.waiting[key_of(owner, name)]
                log.info("%d sessions of model %s version %s are back", len(part.sessions), *key)

    async def write(self) -> None:
        """Writes all sessions, a few in each turn of the event loop and the file on a thread; raises OSError."""
        parts = [part async for part in self._parts()]
        gone = self._gone()
        await asyncio.get_running_loop().run_in_executor(None, self._save, parts, gone)

    def close(self) -> None:
        """Lets others use the file."""
        self._lock.close()

    async def _parts(self) -> Any:
        table, to_wall = self._table, time.time() - self._table.clock()
        for engine in self._engines():
            arena, model = engine.arena, engine.model
            part = _Part({"model": model.name, "version": model.version, "digest": model.digest})
            sessions = [session for session in table.live.values() if session.engine is engine]
            for start in range(0, len(sessions), _ROWS):
                # Those that end while others are copied are left out; each is copied as it is at one moment.
                own = [session for session in sessions[start : start + _ROWS] if session.alive]
                slots = np.array([session.slot for session in own], np.intp)
                part.sessions += [[one.owner, one.id, one.origin.hex(), _told(one.applied)] for one in own]
                rows = {"position": arena.position[slots], "used": arena.used[slots] + to_wall}
                rows |= {f"state.{name}": state for name, state in arena.read_many(slots).items()}
                answers = [one.applied.y for one in own if one.applied is not None and one.applied.y is not None]
                rows["answers"] = np.frombuffer(b"".join(y.tobytes() for y in answers), np.uint8)
                for spec in arena.specs:
                    befores = [one.applied.before[spec.name] for one in own if one.applied and one.applied.before]
                    nothing = [np.empty(0, spec.dtype)]
                    rows[f"before.{spec.name}"] = np.concatenate([s.ravel() for s in befores] or nothing)
                for name, array in rows.items():
                    part.arrays.setdefault(name, []).append(array)
                await asyncio.sleep(0)
            if part.sessions:
                yield part

    def _gone(self) -> list[list[Any]]:
        to_wall = time.time() - self._table.clock()
        return [[key, one.reason, one.position, one.until + to_wall] for key, one in self._store.tombstones.items()]

    def _save(self, parts: list[_Part], gone: list[list[Any]]) -> None:
        with self._saving:  # one that was given up goes on in its thread
            self._save_alone(parts, gone)

    def _save_alone(self, parts: list[_Part], gone: list[list[Any]]) -> None:
        tensors: dict[str, Array] = {}
        models: list[dict[str, Any]] = []
        for part, arrays in [(part, None) for part in parts] + list(self._kept):
            place = len(models)
            if arrays is None:
                tensors |= part.tensors(place)
                names = list(part.arrays)
            else:
                tensors |= {f"{place}/{name}": array for name, array in arrays.items()}
                names = list(arrays)
            models.append({**part.told, "sessions": part.sessions, "arrays": names})
        tensors["told"] = np.frombuffer(orjson.dumps({"models": models, "gone": gone}), np.uint8)
        content = _MAGIC + save(tensors)
        new = self._path.with_name(self._path.name + ".new")
        with new.open("wb") as file:
            file.write(content)
            file.write(hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name is on the disk too
        finally:
            os.close(folder)


def _fill(table: SessionTable, engine: Engine, told: list[list[Any]], arrays: dict[str, Array], now: float) -> int:
    """Makes the sessions of one model; gives their number."""
    arena = engine.arena
    slots = arena.take_many(len(told))
    if slots is None:
        raise BadSnapshot(f"it has {len(told)} sessions of model {engine.model.name}: raise --max-sessions")
    arena.write_many(slots, {name: arrays[f"state.{name}"] for name in arena.names})
    arena.position[slots], arena.used[slots] = arrays["position"], arrays["used"] + now
    outputs, kept = engine.model.outputs, arrays["answers"].tobytes()
    answers, befores = 0, 0
    for row, (owner, session_id, origin, applied) in enumerate(told):
        slot = int(slots[row])
        session = Session(owner, session_id, engine, slot, np.array((slot,)), bytes.fromhex(origin))
        if applied is not None:
            position, digest, reached, shape, large = applied
            y = before = None
            if shape is not None:
                size = math.prod(shape)
                y = np.frombuffer(kept, outputs.dtype, size, answers).reshape(shape)
                answers += y.nbytes
            elif large:
                before = {
                    spec.name: arrays[f"before.{spec.name}"].reshape(-1, *spec.shape)[befores] for spec in arena.specs
                }
                befores += 1
            session.applied = Applied(Request(position, bytes.fromhex(digest)), reached, y, before)
        table.add(session)
    return len(told)


def _told(applied: Applied | None) -> list[Any] | None:
    if applied is None:
        return None
    shape = None if applied.y is None else list(applied.y.shape)
    large = applied.before is not None
    return [applied.request.position, applied.request.digest.hex(), applied.reached, shape, large]


def _read(path: Path) -> dict[str, Array]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadSnapshot(f"{path}: {error}") from None
    if not content.startswith(_MAGIC):
        raise BadSnapshot(f"{path} is not a snapshot of sessions: give another file with --snapshot, it is left alone")
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise BadSnapshot(
            f"{path} is damaged (its SHA-256 does not fit): restore it from a backup, or move it away to begin anew"
        )
    return dict(load(content[len(_MAGIC) : -32]))


def _locked(path: Path) -> IO[bytes]:
    try:
        lock = path.with_name(path.name + ".lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadSnapshot(f"{path} is in use by another process: each server needs a snapshot of its own") from None
    except OSError as error:
        raise BadSnapshot(f"{path}: {error}") from None
    return lock
