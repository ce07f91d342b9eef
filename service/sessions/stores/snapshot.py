"""The snapshot: all sessions of a process in one file, replaced atomically and verified before it is restored.

The file is a line that names the format, a safetensors document, and the SHA-256 of both. The document has, for each
model, its sessions' positions, times and states, one row per session, and everything else about them as JSON.
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

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save

from cellserve.service.access.private_files import append_private, create_private
from cellserve.service.engine.engine import Engine
from cellserve.service.idempotency import AppliedChange, IdempotencyKey
from cellserve.service.model_repository.model import VersionKey
from cellserve.service.sessions.session import Session, key_of
from cellserve.service.sessions.stores.memory import MemoryStore, Tombstone
from cellserve.service.sessions.stores.moment import Moment
from cellserve.service.sessions.stores.snapshot_input import Applied, Index, SessionRow, check_rows, read_document
from cellserve.service.sessions.table import SessionTable

Array = NDArray[Any]

_MAGIC = b"cellserve sessions 1\n"
_ROWS = 2048  # sessions that are copied per iteration of the event loop

log = logging.getLogger("cellserve")


class BadSnapshot(Exception):
    """The snapshot cannot be restored or written; the message says why. The file is left untouched."""


@dataclass
class _Part:
    """The sessions of one model."""

    header: dict[str, Any]  # model, version, digest
    sessions: list[SessionRow] = field(default_factory=list)
    arrays: dict[str, list[Array]] = field(default_factory=dict)

    def tensors(self, place: int) -> dict[str, Array]:
        """Returns the tensors by their names in the document."""
        return {f"{place}/{name}": np.concatenate(rows) for name, rows in self.arrays.items()}


_Content = tuple[_Part, dict[str, Array]]


class Snapshots:
    """Writes a table's sessions to a file, and reads them back.

    Args:
        path: The file; a lock file beside it keeps other processes from using it.
        store: The sessions.
        engines: Returns the engines that are loaded.
        find_engine: Returns the engine of a model version by name and digest, loading it if necessary.

    Raises:
        BadSnapshot: Another process uses the file, or the folder cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        store: MemoryStore,
        engines: Callable[[], list[Engine]],
        find_engine: Callable[[VersionKey, str], Engine | None],
    ) -> None:
        self._path, self._store, self._engines, self._find_engine = path, store, engines, find_engine
        self._table = store.table
        # Parts whose model version is not here, and seconds to add to their times to get the table's clock.
        self._unrestored: list[tuple[_Part, dict[str, Array], float]] = []
        self._lock = _locked(path)
        self._saving = threading.Lock()

    def restore(self) -> int:
        """Restores the sessions from the file, if it exists; returns their number.

        Raises:
            BadSnapshot: The file is damaged or is not a snapshot; it is never overwritten then.
        """
        if not self._path.exists():
            return 0
        index, document = _read(self._path)
        table, now = self._table, self._table.clock() - time.time()
        if index.written is not None:
            now = table.clock() - index.written.elapsed() - index.written.wall
        count = 0
        for place, part in enumerate(index.models):
            arrays = {name: document[f"{place}/{name}"] for name in part.arrays}
            engine = self._find_engine(VersionKey(part.model, part.version), part.digest)
            if engine is None:
                header = {"model": part.model, "version": part.version, "digest": part.digest}
                self._unrestored.append((_Part(header, part.sessions), arrays, now))
                waiting = f"{part.model!r}, version {part.version}"
                self._store.awaiting_model |= {key_of(owner, name): waiting for owner, name, *_ in part.sessions}
                log.error(
                    "%d sessions of model %s version %s stay in the snapshot: that version is not here",
                    len(part.sessions), part.model, part.version,
                )  # fmt: skip
                continue
            count += _restore_sessions(table, engine, part.sessions, arrays, now)
        for key, reason, position, until in index.gone:
            self._store.tombstones[key] = Tombstone(reason, position, until + now)
        return count

    async def restore_waiting(self, find_engine: Callable[[VersionKey, str], Awaitable[Engine | None]]) -> None:
        """Restores the sessions whose model version has appeared since; must not run during `write`.

        Args:
            find_engine: Returns the engine of a model version by name and digest, loading it if necessary.
        """
        for unrestored in list(self._unrestored):
            part, arrays, now = unrestored
            key = VersionKey(part.header["model"], part.header["version"])
            engine = await find_engine(key, part.header["digest"])
            if engine is not None:
                _restore_sessions(self._table, engine, part.sessions, arrays, now)
                self._unrestored.remove(unrestored)
                for owner, name, *_ in part.sessions:
                    del self._store.awaiting_model[key_of(owner, name)]
                log.info("%d sessions of model %s version %s are restored", len(part.sessions), *key)

    async def write(self) -> None:
        """Writes all sessions: copied in parts by the event loop, saved by a thread. Raises OSError."""
        written = Moment.now()
        to_wall = written.wall - self._table.clock()
        parts = [part async for part in self._parts(to_wall)]
        gone = [[key, one.reason, one.position, one.until + to_wall] for key, one in self._store.tombstones.items()]
        unrestored = [
            (part, {name: array + (now + to_wall) if name == "used" else array for name, array in arrays.items()})
            for part, arrays, now in self._unrestored
        ]
        index = {"gone": gone, "written": msgspec.to_builtins(written)}
        await asyncio.get_running_loop().run_in_executor(None, self._save, parts, unrestored, index)

    def close(self) -> None:
        """Releases the lock on the file."""
        self._lock.close()

    async def _parts(self, to_wall: float) -> Any:
        table = self._table
        for engine in self._engines():
            arena, model = engine.arena, engine.model
            part = _Part({"model": model.name, "version": model.version, "digest": model.digest})
            sessions = [session for session in table.live.values() if session.engine is engine]
            for start in range(0, len(sessions), _ROWS):
                # Sessions that end meanwhile are left out; each session is copied at one point in time.
                own = [session for session in sessions[start : start + _ROWS] if session.alive]
                slots = np.array([session.slot for session in own], np.intp)
                part.sessions += [
                    (one.owner, one.id, one.creation_digest.hex(), _applied_to_json(one.applied)) for one in own
                ]
                rows = {"position": arena.position[slots], "used": arena.last_used[slots] + to_wall}
                rows |= {f"state.{name}": state for name, state in arena.read_many(slots).items()}
                answers = [one.applied.y for one in own if one.applied is not None and one.applied.y is not None]
                rows["answers"] = np.frombuffer(b"".join(y.tobytes() for y in answers), np.uint8)
                for spec in arena.specs:
                    befores = [
                        one.applied.states_before[spec.name] for one in own if one.applied and one.applied.states_before
                    ]
                    nothing = [np.empty(0, spec.dtype)]
                    rows[f"before.{spec.name}"] = np.concatenate([s.ravel() for s in befores] or nothing)
                for name, array in rows.items():
                    part.arrays.setdefault(name, []).append(array)
                await asyncio.sleep(0)
            if part.sessions:
                yield part

    def _save(self, parts: list[_Part], unrestored: list[_Content], index: dict[str, Any]) -> None:
        with self._saving:  # a write that was cancelled continues in its thread
            self._save_alone(parts, unrestored, index)

    def _save_alone(self, parts: list[_Part], unrestored: list[_Content], index: dict[str, Any]) -> None:
        tensors: dict[str, Array] = {}
        models: list[dict[str, Any]] = []
        for part, arrays in [*((part, None) for part in parts), *unrestored]:
            place = len(models)
            if arrays is None:
                tensors |= part.tensors(place)
                names = list(part.arrays)
            else:
                tensors |= {f"{place}/{name}": array for name, array in arrays.items()}
                names = list(arrays)
            models.append({**part.header, "sessions": part.sessions, "arrays": names})
        tensors["told"] = np.frombuffer(orjson.dumps({"models": models, **index}), np.uint8)
        content = _MAGIC + save(tensors)
        new = self._path.with_name(self._path.name + ".new")
        with create_private(new) as file:
            file.write(content)
            file.write(hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name is on disk too
        finally:
            os.close(folder)


def _restore_sessions(
    table: SessionTable, engine: Engine, rows: list[SessionRow], arrays: dict[str, Array], now: float
) -> int:
    """Restores the sessions of one model; returns their number. Raises BadSnapshot.

    Args:
        table: Receives the sessions.
        engine: The engine of the model.
        rows: Owner, id, creation digest and applied change of each session.
        arrays: The tensors of the model's sessions, by name.
        now: Seconds to add to the times in them to get the table's clock.
    """
    arena = engine.arena
    try:
        check_rows(engine, rows, arrays)
    except (KeyError, ValueError) as error:
        raise BadSnapshot(f"the snapshot's sessions of model {engine.model.name} are not such: {error}") from None
    slots = arena.allocate_many(len(rows))
    if slots is None:
        raise BadSnapshot(f"the snapshot has {len(rows)} sessions of model {engine.model.name}: raise --max-sessions")
    arena.write_many(slots, {name: arrays[f"state.{name}"] for name in arena.names})
    arena.position[slots] = arrays["position"]
    arena.last_used[slots] = np.minimum(arrays["used"] + now, table.clock())
    outputs, answers = engine.model.outputs, arrays["answers"].tobytes()
    answers_read, befores_read = 0, 0  # bytes of answers, rows of states before a change
    for row, (owner, session_id, creation_digest, applied) in enumerate(rows):
        slot = int(slots[row])
        session = Session(owner, session_id, engine, slot, np.array((slot,)), bytes.fromhex(creation_digest))
        if applied is not None:
            position, digest, position_after, shape, has_states_before = applied
            y = before = None
            if shape is not None:
                size = math.prod(shape)
                y = np.frombuffer(answers, outputs.dtype, size, answers_read).reshape(shape)
                answers_read += y.nbytes
            elif has_states_before:
                before = {
                    spec.name: arrays[f"before.{spec.name}"].reshape(-1, *spec.shape)[befores_read]
                    for spec in arena.specs
                }
                befores_read += 1
            session.applied = AppliedChange(IdempotencyKey(position, bytes.fromhex(digest)), position_after, y, before)
        table.add(session)
    return len(rows)


def _applied_to_json(applied: AppliedChange | None) -> Applied | None:
    if applied is None:
        return None
    shape = None if applied.y is None else list(applied.y.shape)
    has_states_before = applied.states_before is not None
    return applied.key.position, applied.key.digest.hex(), applied.position_after, shape, has_states_before


def _read(path: Path) -> tuple[Index, dict[str, Array]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadSnapshot(f"{path}: {error}") from None
    if not content.startswith(_MAGIC):
        raise BadSnapshot(f"{path} is not a snapshot of sessions and is left untouched: give another --snapshot")
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise BadSnapshot(
            f"{path} is damaged (its SHA-256 does not match): restore it from a backup, or move it away to start empty"
        )
    try:
        return read_document(content[len(_MAGIC) : -32])
    except (ValueError, SafetensorError) as error:
        raise BadSnapshot(f"{path} is not as a server writes it, and is left untouched: {error}") from None


def _locked(path: Path) -> IO[bytes]:
    try:
        lock = append_private(path.with_name(path.name + ".lock"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadSnapshot(f"{path} is in use by another process: each server needs a snapshot of its own") from None
    except OSError as error:
        raise BadSnapshot(f"{path}: {error}") from None
    return lock
