"""The records of one LMDB environment, and what a transaction does with them.

A session's record changes with each step. The index of deadlines does not: its entry says when to look at the session
next, and is moved on if the session was used meanwhile. Times are seconds since the epoch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import lmdb

from cellserve.service.sessions.session import Room
from cellserve.service.sessions.stores.lmdb.clients import ClientIndex
from cellserve.service.sessions.stores.lmdb.environment import Environment
from cellserve.service.sessions.stores.lmdb.header import (
    CHANGED,
    CHECKED,
    HEADER_BYTES,
    Header,
    stamp_and_deadline,
    to_key,
)
from cellserve.service.sessions.stores.lmdb.model_numbers import ModelNumbers
from cellserve.service.sessions.stores.records import (
    POSITIONS,
    ConditionalWrites,
    SessionRecord,
    StoredAnswer,
    TombstoneRecord,
    UnreadableRecord,
    VersionStamp,
    WriteOutcome,
)

_TOMBSTONE = struct.Struct("<dQB")  # when it is forgotten, position, reason
_TIME = struct.Struct(">d")  # orders as its number does
_REASONS = "deleted", "expired", "evicted"
_SLACK = 1.1  # of the idle time: so that reading a session in constant use rarely writes
_TRIES = 64  # sessions that are looked at to find one that has been idle for long


@dataclass(frozen=True, slots=True)
class Found:
    """What a key leads to, and for a session, its deadline."""

    record: SessionRecord | TombstoneRecord | None
    deadline: float = 0.0


class ListedRecord(NamedTuple):
    """A session in a list."""

    key: bytes
    model: str = ""
    version: int = 0
    position: int = 0
    created_at: float = 0.0
    deadline: float = 0.0
    unreadable: UnreadableRecord | None = None  # why what is there is not a session


class Records:
    """The databases of an environment.

    Args:
        environment: The environment.
        idle_seconds: A session not written or read for so long expires.
        tombstone_seconds: How long ended sessions are answered 410 instead of 404.
    """

    def __init__(self, environment: Environment, idle_seconds: float, tombstone_seconds: float) -> None:
        self.environment = environment
        self._life, self._tombstone_seconds = _SLACK * idle_seconds, tombstone_seconds
        self._sessions = environment.database(b"sessions")
        self._deadlines = environment.database(b"deadlines")
        self._tombstones = environment.database(b"tombstones")
        self._forgetting = environment.database(b"forgetting")  # tombstones by the time until which they are kept
        of_client, totals = environment.database(b"of client"), environment.database(b"totals")
        models = environment.database(b"models")
        self._clients, self._models = ClientIndex(of_client, totals), ModelNumbers(models)
        self._all = (
            self._sessions, self._deadlines, self._tombstones, self._forgetting, of_client, totals, models,
        )  # fmt: skip

    # Reading

    def stamp(self, key: bytes) -> bytes | None:
        """Returns the packed stamp of a session: a look into the map."""
        with self.environment.read() as transaction:
            record = transaction.get(key, db=self._sessions)
            return None if record is None else stamp_and_deadline(record)[0]

    def stamps(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Returns the packed stamps of sessions."""
        with self.environment.read() as transaction, transaction.cursor(db=self._sessions) as cursor:
            return [stamp_and_deadline(cursor.value())[0] if cursor.set_key(key) else None for key in keys]

    def load(self, key: bytes, now: float) -> Found:
        """Reads a session, or its tombstone; raises UnreadableRecord."""
        with self.environment.read() as transaction:
            record = transaction.get(key, db=self._sessions)
            if record is None:
                return Found(self._tombstone(transaction, key, now))
            header = Header.read(record)
            model = self._models.model(transaction, header.model)
            if header.deadline <= now:
                return Found(TombstoneRecord("expired", header.position))
            stamp, last = VersionStamp.unpack(header.stamp), StoredAnswer.read(header.answer(record))
            origin, states = header.origin(record), header.states(record)
            return Found(SessionRecord(*model, origin, stamp, states, last, header.created_at), header.deadline)

    def page(self, prefix: bytes, start: bytes, limit: int, now: float) -> list[ListedRecord]:
        """Returns the first sessions from a key on."""
        found: list[ListedRecord] = []
        with self.environment.read() as transaction, transaction.cursor(db=self._sessions) as cursor:
            more = cursor.set_range(start)
            while more and len(found) < limit and (key := bytes(cursor.key())).startswith(prefix):
                try:
                    header = Header.read(cursor.value())
                    name, version, _ = self._models.model(transaction, header.model)
                    if not _is_text(key):
                        raise UnreadableRecord("its id is not a text")
                except UnreadableRecord as error:
                    found.append(ListedRecord(key, unreadable=error))
                else:
                    if header.deadline > now:
                        times = header.created_at, header.deadline
                        found.append(ListedRecord(key, name, version, header.position, *times))
                more = cursor.next()
        return found

    def count(self) -> int:
        """Returns the number of sessions."""
        with self.environment.read() as transaction:
            return int(transaction.stat(self._sessions)["entries"])

    def bytes_used(self) -> int:
        """Returns the bytes of the pages that hold something."""
        with self.environment.read() as transaction:
            stats = [transaction.stat(one) for one in self._all]
        return sum(one["psize"] * (one["branch_pages"] + one["leaf_pages"] + one["overflow_pages"]) for one in stats)

    def is_due(self, now: float) -> bool:
        """Returns whether `sweep` has something to do."""
        with self.environment.read() as transaction:
            for index in (self._deadlines, self._forgetting):
                with transaction.cursor(db=index) as cursor:
                    if cursor.first() and _due_at(cursor.key()) <= now:
                        return True
        return False

    # Jobs for write transactions

    def write(self, transaction: lmdb.Transaction, writes: ConditionalWrites, now: float) -> list[WriteOutcome]:
        """Writes the sessions that are as expected; returns the outcome of each: WRITTEN, CONFLICT or GONE."""
        outcomes, until = [], now + self._life
        with transaction.cursor(db=self._sessions) as cursor:  # one for all: it is half of the time of `get` and `put`
            rows = zip(writes.keys, writes.expected, writes.stamps, writes.states, writes.answers, strict=True)
            for name, expected, stamp, states, answer in rows:
                key = to_key(name)
                if not cursor.set_key(key):
                    outcomes.append(WriteOutcome.GONE)
                    continue
                record = cursor.value()
                if len(record) < HEADER_BYTES:
                    outcomes.append(WriteOutcome.CONFLICT)
                    continue
                # Without functions of its own: it is a fifth of the time.
                found, deadline, origin_bytes, client_bytes = CHECKED.unpack_from(record)
                if deadline <= now:
                    outcomes.append(WriteOutcome.GONE)
                elif found != expected:
                    outcomes.append(WriteOutcome.CONFLICT)
                else:
                    kept = record[CHANGED.size : HEADER_BYTES + origin_bytes + client_bytes]
                    # The answer to an earlier change is of no use any more.
                    cursor.put(key, b"".join((CHANGED.pack(stamp, until, len(states)), kept, states, answer)))
                    outcomes.append(WriteOutcome.WRITTEN)
        return outcomes

    def touch(self, transaction: lmdb.Transaction, key: bytes, now: float) -> None:
        """Extends a session's life."""
        record = transaction.get(key, db=self._sessions)
        if record is not None:
            header = Header.read(record)._replace(deadline=now + self._life)
            transaction.put(key, header.before_rest_of(record), db=self._sessions)

    def create(
        self,
        transaction: lmdb.Transaction,
        key: bytes,
        new: SessionRecord,
        now: float,
        replace: bool,
        room: Room,
        others: tuple[int, int, int],
    ) -> WriteOutcome:
        """Creates a session: WRITTEN, EXISTS, GONE if it has ended, FULL, or CROWDED by its client.

        Args:
            transaction: The transaction.
            key: Its key.
            new: The session.
            now: The time.
            replace: Replace any existing or ended one.
            room: What there may be.
            others: The sessions of the other shards, and those of the client with the bytes of their states.
        """
        old = transaction.get(key, db=self._sessions)
        if old is not None and not replace:
            return WriteOutcome.EXISTS if stamp_and_deadline(old)[1] > now else WriteOutcome.GONE
        ended = self._tombstone(transaction, key, now) is not None
        if ended and not replace:
            return WriteOutcome.GONE
        client = room.client.encode()
        sessions, state_bytes = self._clients.total(transaction, client)
        if old is None:
            limits = room.client_limits
            if (
                sessions + others[1] >= limits.sessions
                or state_bytes + others[2] + len(new.states) > limits.state_bytes
            ):
                return WriteOutcome.CROWDED
            if int(transaction.stat(self._sessions)["entries"]) + others[0] >= room.max_sessions:
                return WriteOutcome.FULL
        else:
            self._remove(transaction, key)
        if ended:
            transaction.delete(key, db=self._tombstones)
        until, model = now + self._life, self._models.number(transaction, new)
        lengths = len(new.creation_digest), len(client)
        header = Header(new.stamp.packed, until, len(new.states), until, new.created_at, model, *lengths)
        last = b"" if new.last is None else bytes(new.last)
        record = b"".join((header.pack(), new.creation_digest, client, new.states, last))
        transaction.put(key, record, db=self._sessions)
        transaction.put(_TIME.pack(until) + key, b"", db=self._deadlines)
        self._clients.add(transaction, client, key, len(new.states))
        return WriteOutcome.WRITTEN

    def end(
        self, transaction: lmdb.Transaction, key: bytes, reason: str, position: int | None, now: float
    ) -> WriteOutcome:
        """Ends a session: WRITTEN, CONFLICT if it is not at the position, or GONE."""
        old = transaction.get(key, db=self._sessions)
        if old is None:
            return WriteOutcome.GONE
        stamp, deadline = stamp_and_deadline(old)
        if deadline <= now:
            return WriteOutcome.GONE
        at = VersionStamp.unpack(stamp).position if stamp else None
        if at is not None and at >= POSITIONS:
            at = None  # the record is damaged
        if position is not None and position != at:
            return WriteOutcome.CONFLICT
        self._bury(transaction, key, reason, at or 0, now)
        return WriteOutcome.WRITTEN

    def sweep(self, transaction: lmdb.Transaction, now: float, most: int) -> int:
        """Ends sessions whose deadline is over, and forgets old tombstones; returns how many sessions have expired.

        Args:
            transaction: The transaction.
            now: The time.
            most: Entries of the indexes that are looked at, at most.
        """
        expired = 0
        for _ in range(most):
            entry = self._first(transaction, self._deadlines, now)
            if entry is None:
                break
            at, key = entry
            record = self._move_entry(transaction, at, key)
            if record is not None and record[1] <= now:
                self._bury(transaction, key, "expired", record[0], record[1])
                expired += 1
        for _ in range(most):
            entry = self._first(transaction, self._forgetting, now)
            if entry is None:
                break
            at, key = entry
            transaction.delete(_TIME.pack(at) + key, db=self._forgetting)
            tombstone = _read_tombstone(transaction.get(key, db=self._tombstones))
            if tombstone is not None and tombstone[0] == at:
                transaction.delete(key, db=self._tombstones)
        return expired

    def longest_idle(self, transaction: lmdb.Transaction) -> tuple[float, bytes] | None:
        """Returns the deadline and key of about the longest idle session: of the first few in the index."""
        best: tuple[float, bytes] | None = None
        for _ in range(_TRIES):
            entry = self._first(transaction, self._deadlines, float("inf"))
            if entry is None:
                break
            at, key = entry
            if best is not None and best[0] <= at:
                break  # an entry is never behind its session's deadline
            record = self._move_entry(transaction, at, key)
            if record is not None and (best is None or record[1] < best[0]):
                best = record[1], key
        return best

    def longest_idle_of(self, client: str) -> tuple[float, bytes] | None:
        """Returns the deadline and key of about the longest idle session that a client has made."""
        with self.environment.read() as transaction:
            keys = islice(self._clients.keys(transaction, client.encode()), _TRIES)
            records = [(transaction.get(key, db=self._sessions), key) for key in keys]
            found = [(stamp_and_deadline(record)[1], key) for record, key in records if record is not None]
        return min(found, default=None)

    def client_total(self, client: str) -> tuple[int, int]:
        """Returns how many sessions a client has made here, and the bytes of their states."""
        with self.environment.read() as transaction:
            return self._clients.total(transaction, client.encode())

    def _first(self, transaction: lmdb.Transaction, index: Any, now: float) -> tuple[float, bytes] | None:
        """Returns the first entry of an index if it is due: its time and key. What is no entry is removed."""
        with transaction.cursor(db=index) as cursor:
            while cursor.first():
                entry = bytes(cursor.key())
                at = _due_at(entry)
                if at != -math.inf:
                    return (at, entry[_TIME.size :]) if at <= now else None
                cursor.delete()
        return None

    def _move_entry(self, transaction: lmdb.Transaction, at: float, key: bytes) -> tuple[int, float] | None:
        """Moves an entry of the index to its session's deadline; returns the session's position and deadline.

        An entry that no session has is removed, and that of one that cannot be read, which does not expire.
        """
        old = transaction.get(key, db=self._sessions)
        header = None if old is None else _header(old)
        if header is not None and header.indexed == at:
            if header.deadline != at:
                moved = header._replace(indexed=header.deadline)
                transaction.put(key, moved.before_rest_of(old), db=self._sessions)
                transaction.delete(_TIME.pack(at) + key, db=self._deadlines)
                transaction.put(_TIME.pack(header.deadline) + key, b"", db=self._deadlines)
            return header.position, header.deadline
        transaction.delete(_TIME.pack(at) + key, db=self._deadlines)
        return None

    def _remove(self, transaction: lmdb.Transaction, key: bytes) -> None:
        """Removes a session from all databases; one that cannot be read still counts among its client's."""
        old: Any = transaction.get(key, db=self._sessions)
        header = _header(old)
        if header is not None:
            client = header.client(old)
            transaction.delete(_TIME.pack(header.indexed) + key, db=self._deadlines)
            self._clients.remove(transaction, client, key, header.state_bytes)
        transaction.delete(key, db=self._sessions)

    def _bury(self, transaction: lmdb.Transaction, key: bytes, reason: str, position: int, now: float) -> None:
        self._remove(transaction, key)
        until = now + self._tombstone_seconds
        transaction.put(key, _TOMBSTONE.pack(until, position, _REASONS.index(reason)), db=self._tombstones)
        transaction.put(_TIME.pack(until) + key, b"", db=self._forgetting)

    def _tombstone(self, transaction: lmdb.Transaction, key: bytes, now: float) -> TombstoneRecord | None:
        tombstone = _read_tombstone(transaction.get(key, db=self._tombstones))
        if tombstone is None or not tombstone[0] > now:
            return None
        return TombstoneRecord(_REASONS[tombstone[2]], tombstone[1])


def _read_tombstone(value: Any) -> tuple[float, int, int] | None:
    """Decodes a tombstone: when it is forgotten, the position, and the reason's number; None if it is not one."""
    if value is None or len(value) != _TOMBSTONE.size:
        return None
    until, position, reason = _TOMBSTONE.unpack(value)
    return (until, position, reason) if position < POSITIONS and reason < len(_REASONS) else None


def _due_at(entry: Any) -> float:
    """Returns the time of an entry in an index; minus infinity if it is no entry."""
    return float(_TIME.unpack_from(entry)[0]) if len(entry) > _TIME.size else -math.inf


def _is_text(key: bytes) -> bool:
    try:
        key.decode()
    except UnicodeDecodeError:
        return False
    return True


def _header(record: Any) -> Header | None:
    """Returns the header of a record; None if it cannot be read."""
    try:
        return Header.read(record)
    except UnreadableRecord:
        return None
