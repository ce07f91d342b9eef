"""The client of an LMDB store: the sessions of a folder, over all its shards.

A read is a look into the map, a write one transaction of microseconds: both are done at once in the event loop. With a
sync per commit, and for large ticks, writes are done in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from cellserve.service.engine.stats import SECONDS, Histogram
from cellserve.service.errors import Problem, ServerFull, StoreUnavailable
from cellserve.service.sessions.session import Durable, Room, SessionSummary
from cellserve.service.sessions.stores.lmdb.folder import Folder
from cellserve.service.sessions.stores.lmdb.header import from_key, to_key
from cellserve.service.sessions.stores.lmdb.records import Found, Records
from cellserve.service.sessions.stores.protocol import StoreFiles
from cellserve.service.sessions.stores.records import (
    ConditionalWrites,
    SessionRecord,
    TombstoneRecord,
    UnreadableRecord,
    WriteOutcome,
)

LARGE_BYTES = 1024 * 1024  # states of a tick; more are written in a thread
_SWEPT = 200  # entries per transaction
_SWEEP_SECONDS = 0.005  # of the event loop
_NEARLY_FULL = 0.9  # of the map: then there are no new sessions, so that steps of the others can go on

T = TypeVar("T")
Outcome = WriteOutcome | Problem


class LmdbClient:
    """The sessions of a folder; a `StoreClient`.

    Args:
        folder: The folder.
        idle_seconds: A session not written or read for so long expires.
        tombstone_seconds: How long ended sessions are answered 410 instead of 404.
        max_bytes: Bytes of the folder's files, at most.
        clock: Returns seconds since the epoch; by default, the folder's clock does.
    """

    def __init__(
        self,
        folder: Folder,
        idle_seconds: float,
        tombstone_seconds: float,
        max_bytes: int,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.folder = folder
        self.durable: Durable = "disk" if folder.sync else "process"
        self._idle_seconds, self._clock = idle_seconds, clock or folder.clock
        self._shards = [Records(shard, idle_seconds, tombstone_seconds) for shard in folder.shards]
        self._shard_bytes = max_bytes // len(self._shards)
        self._sync_seconds = Histogram(SECONDS)
        self._expired = 0  # sessions that have expired since the last call of `count`
        self._sweeping: asyncio.Task[None] | None = None
        for shard in folder.shards:
            shard.begin_checkpoints()

    @property
    def errors(self) -> Mapping[str, int]:
        """Writes that failed so far, by reason."""
        each = [shard.errors for shard in self.folder.shards]
        return {reason: sum(errors[reason] for errors in each) for reason in each[0]}

    def files(self) -> StoreFiles:
        """Returns what the store has on this machine's disk."""
        self._note_syncs()
        shards = self.folder.shards
        ages = [age for shard in shards if (age := shard.checkpoint_age) is not None]
        return StoreFiles(
            used_bytes=sum(records.bytes_used() for records in self._shards),
            file_bytes=sum(shard.bytes_used for shard in shards),
            max_bytes=self._shard_bytes * len(shards),
            free_bytes=shards[0].free_bytes,
            readers=sum(shard.readers for shard in shards),
            checkpoint_age=max(ages, default=None),
            sync_seconds=self._sync_seconds,
        )

    def _note_syncs(self) -> None:
        for shard in self.folder.shards:
            self._sync_seconds.observe_all(shard.take_syncs())

    async def start(self) -> None:
        """Has nothing to check."""

    async def leave_to_workers(self) -> None:
        """Closes the folder's files, and keeps the folder from other servers."""
        await self.folder.leave_to_workers()

    async def close(self) -> None:
        """Closes the folder."""
        if self._sweeping is not None:
            await self._sweeping
        await self.folder.close()

    # Reading

    def find(self, key: str) -> Found:
        """Reads a session, or its tombstone, as they are."""
        stored = to_key(key)
        return self._of(stored).load(stored, self._clock())

    def stamp(self, key: str) -> bytes | None:
        """Returns the packed stamp of a session."""
        stored = to_key(key)
        return self._of(stored).stamp(stored)

    def stamps(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        """Returns the packed stamps of sessions."""
        stored = list(map(to_key, keys))
        if len(self._shards) == 1:
            return self._shards[0].stamps(stored)
        rows = self.folder.rows_by_shard(stored)
        return _in_order(rows, [self._shards[one].stamps([stored[row] for row in own]) for one, own in rows.items()])

    async def load(self, key: str) -> SessionRecord | TombstoneRecord | None:
        """Reads a session, or its tombstone, and extends its life."""
        found, now, stored = self.find(key), self._clock(), to_key(key)
        if isinstance(found.record, SessionRecord) and found.deadline - now < self._idle_seconds:
            records = self._of(stored)
            with suppress(StoreUnavailable):  # on a full disk, reading goes on
                await records.environment.write(lambda transaction: records.touch(transaction, stored, now))
        return found.record

    async def count(self) -> tuple[int, int]:
        """Returns the number of live sessions, and of those that have expired here since the last call."""
        expired, self._expired = self._expired, 0
        return sum(records.count() for records in self._shards), expired

    async def page(self, owner: str, after: int, limit: int) -> tuple[list[SessionSummary | UnreadableRecord], int]:
        """Returns a page of an owner's sessions, and where the next one starts; 0: nowhere.

        That is the bytes of a number: 1, a shard, and the id to go on from.
        """
        own, now = f"{owner}/".encode(), self._clock()
        place = after.to_bytes((after.bit_length() + 7) // 8, "big")[1:] or b"\0"
        found: list[SessionSummary | UnreadableRecord] = []
        for number in range(place[0], len(self._shards)):
            start = own + (place[1:] if number == place[0] else b"")
            for one in self._shards[number].page(own, start, limit + 1 - len(found), now):
                name = one.key[len(own) :]
                if len(found) == limit:
                    return found, int.from_bytes(b"\1" + bytes([number]) + name, "big")
                found.append(
                    one.unreadable
                    or SessionSummary(name.decode(), one.model, one.version, one.position, one.created_at)
                )
        return found, 0

    # Writing

    async def create(self, key: str, session: SessionRecord, room: Room) -> WriteOutcome:
        """Creates a session: WRITTEN, EXISTS, GONE if it has ended, FULL, or CROWDED by its client."""
        return await self._create(key, session, room, False)

    async def replace(self, key: str, session: SessionRecord, room: Room) -> WriteOutcome:
        """Creates a session, replacing any existing or ended one: WRITTEN, or FULL or CROWDED if there was none."""
        return await self._create(key, session, room, True)

    async def _create(self, key: str, session: SessionRecord, room: Room, replace: bool) -> WriteOutcome:
        stored, now = to_key(key), self._clock()
        records = self._of(stored)
        self._check_room(records)
        await self._sweep_first()  # expired sessions make room
        rest = [one for one in self._shards if one is not records]
        clients = [one.client_total(room.client) for one in rest]
        others = sum(one.count() for one in rest), sum(one[0] for one in clients), sum(one[1] for one in clients)
        return await records.environment.write(
            lambda transaction: records.create(transaction, stored, session, now, replace, room, others)
        )

    def _check_room(self, records: Records) -> None:
        """Raises ServerFull where a new session would leave too little for the steps of the others."""
        file = records.environment.bytes_used
        on_disk = file + records.environment.free_bytes // len(self._shards)
        bound = _NEARLY_FULL * min(self._shard_bytes, on_disk)
        if file > bound and records.bytes_used() > bound:
            what = "reached --store-max-bytes" if self._shard_bytes < on_disk else "filled the disk of --store"
            raise ServerFull(f"the sessions have nearly {what}: delete some, or try again later")

    async def write(self, writes: ConditionalWrites, touched: Sequence[str] = ()) -> Sequence[WriteOutcome | Problem]:
        """Writes sessions; returns the outcome of each: WRITTEN, CONFLICT, GONE, or StoreUnavailable."""
        large = sum(map(len, writes.states)) > LARGE_BYTES

        async def write_part(number: int, part: ConditionalWrites) -> Sequence[Outcome]:
            try:
                return await self.folder.shards[number].write(self._writing(number, part), large)
            except StoreUnavailable as problem:
                return [problem] * len(part)

        if len(self._shards) == 1:
            return await write_part(0, writes)
        rows = self.folder.rows_by_shard(map(to_key, writes.keys))
        parts = (write_part(number, writes.take(own)) for number, own in rows.items())
        return _in_order(rows, await asyncio.gather(*parts))

    def write_now(self, writes: ConditionalWrites) -> Sequence[Outcome]:
        """Writes sessions in the calling thread, one transaction per shard; returns the outcome of each."""
        if len(self._shards) == 1:
            return self._write_part_now(0, writes)
        rows = self.folder.rows_by_shard(map(to_key, writes.keys))
        return _in_order(rows, [self._write_part_now(number, writes.take(own)) for number, own in rows.items()])

    def _write_part_now(self, number: int, part: ConditionalWrites) -> Sequence[Outcome]:
        try:
            return self.folder.shards[number].run(self._writing(number, part))
        except StoreUnavailable as problem:
            return [problem] * len(part)

    async def end(self, key: str, reason: str, position: int | None = None) -> WriteOutcome:
        """Ends a session: WRITTEN, CONFLICT if it is not at the position, or GONE."""
        stored, now = to_key(key), self._clock()
        records = self._of(stored)
        return await records.environment.write(
            lambda transaction: records.end(transaction, stored, reason, position, now)
        )

    async def longest_idle(self, client: str | None = None) -> str | None:
        """Returns the key of about the longest idle session, of all or of those that a client has made."""
        if client is None:
            found = [await records.environment.write(records.longest_idle) for records in self._shards]
        else:
            found = [records.longest_idle_of(client) for records in self._shards]
        best = min((one for one in found if one is not None), default=None)
        return None if best is None else from_key(best[1])

    def keep_house(self) -> None:
        """Expires sessions, forgets tombstones, takes checkpoints; a part of it if there is much."""
        for shard in self.folder.shards:
            shard.keep_house()
        self._note_syncs()
        if not self.folder.sync:
            until = time.monotonic() + _SWEEP_SECONDS
            while self._sweep_due() and time.monotonic() < until:
                pass
        else:
            self._begin_sweep()

    async def _sweep_first(self) -> None:
        """Sweeps a few sessions of each shard."""
        if not self.folder.sync:
            self._sweep_due()
            return
        self._begin_sweep()
        if self._sweeping is not None:
            await asyncio.shield(self._sweeping)

    def _begin_sweep(self) -> None:
        """Begins to sweep in the thread if something is due."""
        if self._sweeping is None and any(records.is_due(self._clock()) for records in self._shards):
            self._sweeping = asyncio.get_running_loop().create_task(self._sweep_in_thread())

    def _sweep_due(self) -> bool:
        """Sweeps a few sessions of each shard; returns whether there are more."""
        now = self._clock()
        due = [records for records in self._shards if records.is_due(now)]
        try:
            for records in due:
                self._expired += records.environment.run(_sweeping(records, now))
        except StoreUnavailable:
            return False
        return bool(due)

    async def _sweep_in_thread(self) -> None:
        try:
            for records in self._shards:
                now = self._clock()
                if records.is_due(now):
                    self._expired += await records.environment.write(_sweeping(records, now))
        except StoreUnavailable:
            pass  # counted and logged
        finally:
            self._sweeping = None

    def _of(self, key: bytes) -> Records:
        return self._shards[self.folder.shard_of(key)]

    def _writing(self, number: int, writes: ConditionalWrites) -> Callable[[Any], list[WriteOutcome]]:
        records, now = self._shards[number], self._clock()
        return lambda transaction: records.write(transaction, writes, now)


def _in_order(rows: dict[int, list[int]], parts: Sequence[Sequence[T]]) -> list[T]:
    """Returns the results of the shards' rows in the order of the rows."""
    results: list[Any] = [None] * sum(map(len, parts))
    for own, part in zip(rows.values(), parts, strict=True):
        for row, result in zip(own, part, strict=True):
            results[row] = result
    return results


def _sweeping(records: Records, now: float) -> Callable[[Any], int]:
    return lambda transaction: records.sweep(transaction, now, _SWEPT)
