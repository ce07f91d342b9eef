"""The records of one LMDB environment, and what a transaction does with them.

A session's record changes with each step. The index of deadlines does not: its entry says when to look at the session
next, and is moved on if the session was used meanwhile. Times are seconds since the epoch.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lmdb

from cellserve.service.sessions.session import Room
from cellserve.service.sessions.stores.lmdb.environment import Environment
from cellserve.service.sessions.stores.records import (
    ConditionalWrite,
    SessionRecord,
    StoredAnswer,
    TombstoneRecord,
    UnreadableRecord,
    VersionStamp,
    WriteOutcome,
)

# Position, revision, deadline, time of its index entry, number of its model, bytes of the states, the creation digest
# and the client's name. Behind it: digest, client, states, and what is needed to answer a repetition.
_HEADER = struct.Struct("<Q16sddIIBB")
_STAMP = struct.Struct("<Q16s")
_TOMBSTONE = struct.Struct("<dQB")  # when it is forgotten, position, reason
_TIME = struct.Struct(">d")  # orders as its number does
_TOTAL = struct.Struct("<QQ")  # a client's sessions here, and the bytes of their states
_NUMBER = struct.Struct(">I")
_REASONS = "deleted", "expired", "evicted"
_SLACK = 1.1  # of the idle time: so that reading a session in constant use rarely writes
_TRIES = 64  # sessions that are looked at to find one that has been idle for long


@dataclass(frozen=True, slots=True)
class Found:
    """What a key leads to, and for a session, its deadline."""

    record: SessionRecord | TombstoneRecord | None
    deadline: float = 0.0


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
        self._of_client = environment.database(
            b"of client"
        )  # client, a zero byte, and the key of a session that it made
        self._totals = environment.database(b"totals")
        self._models = environment.database(b"models")
        self._all = (
            self._sessions, self._deadlines, self._tombstones, self._forgetting, self._of_client, self._totals,
            self._models,
        )  # fmt: skip
        self._known_models: dict[int, tuple[str, int, str]] = {}

    # Reading

    def stamp(self, key: bytes) -> tuple[int, bytes] | None:
        """Returns the position and revision of a session: a look into the map."""
        with self.environment.read() as transaction:
            value = transaction.get(key, db=self._sessions)
            return None if value is None else _STAMP.unpack_from(value)

    def load(self, key: bytes, now: float) -> Found:
        """Reads a session, or its tombstone; raises UnreadableRecord."""
        with self.environment.read() as transaction:
            value = transaction.get(key, db=self._sessions)
            if value is None:
                return Found(self._tombstone(transaction, key, now))
            try:
                position, revision, deadline, _, model, size, origin, client = _HEADER.unpack_from(value)
                identity = self._model(transaction, model)
            except (struct.error, ValueError, TypeError):
                raise UnreadableRecord("its header is damaged") from None
            if deadline <= now:
                return Found(TombstoneRecord("expired", position))
            states = _HEADER.size + origin + client
            record = SessionRecord(
                *identity,
                bytes(value[_HEADER.size : _HEADER.size + origin]),
                VersionStamp(position, revision),
                bytes(value[states : states + size]),
                StoredAnswer.read(bytes(value[states + size :])),
            )
            return Found(record, deadline)

    def page(self, prefix: bytes, start: bytes, limit: int, now: float) -> list[tuple[bytes, str, int, int, float]]:
        """Returns the first sessions from a key on: key, model, version, position and deadline."""
        found: list[tuple[bytes, str, int, int, float]] = []
        with self.environment.read() as transaction, transaction.cursor(db=self._sessions) as cursor:
            more = cursor.set_range(start)
            while more and len(found) < limit and (key := bytes(cursor.key())).startswith(prefix):
                position, _, deadline, _, model, *_ = _HEADER.unpack_from(cursor.value())
                if deadline > now:
                    name, version, _ = self._model(transaction, model)
                    found.append((key, name, version, position, deadline))
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
                    if cursor.first() and _TIME.unpack_from(cursor.key())[0] <= now:
                        return True
        return False

    # Jobs for write transactions

    def write(
        self, transaction: lmdb.Transaction, writes: Sequence[ConditionalWrite], now: float
    ) -> list[WriteOutcome]:
        """Writes the sessions that are as expected; returns the outcome of each: WRITTEN, CONFLICT or GONE."""
        outcomes, sessions, until = [], self._sessions, now + self._life
        for one in writes:
            key, stamp, expected = to_key(one.key), one.stamp, one.expected
            old = transaction.get(key, db=sessions)
            if old is None:
                outcomes.append(WriteOutcome.GONE)
                continue
            position, revision, deadline, indexed, model, _, origin, client = _HEADER.unpack_from(old)
            if deadline <= now:
                outcomes.append(WriteOutcome.GONE)
            elif position != expected.position or revision != expected.revision:
                outcomes.append(WriteOutcome.CONFLICT)
            else:
                header = _HEADER.pack(
                    stamp.position, stamp.revision, until, indexed, model, len(one.states), origin, client
                )
                # A stored answer is of use at the position that it has led to only: it is not kept.
                last = b"" if one.last is None else bytes(one.last)
                maker = old[_HEADER.size : _HEADER.size + origin + client]  # the creation digest and the client
                transaction.put(key, b"".join((header, maker, one.states, last)), db=sessions)
                outcomes.append(WriteOutcome.WRITTEN)
        return outcomes

    def touch(self, transaction: lmdb.Transaction, key: bytes, now: float) -> None:
        """Extends a session's life."""
        old = transaction.get(key, db=self._sessions)
        if old is not None:
            position, revision, _, *rest = _HEADER.unpack_from(old)
            header = _HEADER.pack(position, revision, now + self._life, *rest)
            transaction.put(key, header + bytes(old[_HEADER.size :]), db=self._sessions)

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
            return WriteOutcome.EXISTS if _HEADER.unpack_from(old)[2] > now else WriteOutcome.GONE
        ended = self._tombstone(transaction, key, now) is not None
        if ended and not replace:
            return WriteOutcome.GONE
        client = room.client.encode()
        sessions, state_bytes = self._total(transaction, client)
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
        until, stamp = now + self._life, new.stamp
        model, origin = self._model_number(transaction, new), len(new.creation_digest)
        header = _HEADER.pack(stamp.position, stamp.revision, until, until, model, len(new.states), origin, len(client))
        last = b"" if new.last is None else bytes(new.last)
        value = b"".join((header, new.creation_digest, client, new.states, last))
        transaction.put(key, value, db=self._sessions)
        transaction.put(_TIME.pack(until) + key, b"", db=self._deadlines)
        transaction.put(client + b"\0" + key, b"", db=self._of_client)
        self._add_to_total(transaction, client, 1, len(new.states))
        return WriteOutcome.WRITTEN

    def end(
        self, transaction: lmdb.Transaction, key: bytes, reason: str, position: int | None, now: float
    ) -> WriteOutcome:
        """Ends a session: WRITTEN, CONFLICT if it is not at the position, or GONE."""
        old = transaction.get(key, db=self._sessions)
        if old is None:
            return WriteOutcome.GONE
        at, _, deadline, *_ = _HEADER.unpack_from(old)
        if deadline <= now:
            return WriteOutcome.GONE
        if position is not None and position != at:
            return WriteOutcome.CONFLICT
        self._bury(transaction, key, reason, at, now)
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
            tombstone = transaction.get(key, db=self._tombstones)
            if tombstone is not None and _TOMBSTONE.unpack(tombstone)[0] == at:
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
        prefix, best = client.encode() + b"\0", None
        with self.environment.read() as transaction, transaction.cursor(db=self._of_client) as cursor:
            more = cursor.set_range(prefix)
            for _ in range(_TRIES):
                if not more or not (entry := bytes(cursor.key())).startswith(prefix):
                    break
                key = entry[len(prefix) :]
                value: Any = transaction.get(key, db=self._sessions)
                found = _HEADER.unpack_from(value)[2], key
                best = found if best is None else min(best, found)
                more = cursor.next()
        return best

    def client_total(self, client: str) -> tuple[int, int]:
        """Returns how many sessions a client has made here, and the bytes of their states."""
        with self.environment.read() as transaction:
            return self._total(transaction, client.encode())

    def _first(self, transaction: lmdb.Transaction, index: Any, now: float) -> tuple[float, bytes] | None:
        """Returns the first entry of an index if it is due: its time and key."""
        with transaction.cursor(db=index) as cursor:
            if not cursor.first():
                return None
            entry = bytes(cursor.key())
        (at,) = _TIME.unpack_from(entry)
        return (at, entry[_TIME.size :]) if at <= now else None

    def _move_entry(self, transaction: lmdb.Transaction, at: float, key: bytes) -> tuple[int, float] | None:
        """Moves an entry of the index to its session's deadline; returns the session's position and deadline.

        An entry that no session has is removed.
        """
        old = transaction.get(key, db=self._sessions)
        if old is not None:
            position, revision, deadline, indexed, *rest = _HEADER.unpack_from(old)
            if indexed == at:
                if deadline != at:
                    value = _HEADER.pack(position, revision, deadline, deadline, *rest) + bytes(old[_HEADER.size :])
                    transaction.put(key, value, db=self._sessions)
                    transaction.delete(_TIME.pack(at) + key, db=self._deadlines)
                    transaction.put(_TIME.pack(deadline) + key, b"", db=self._deadlines)
                return position, deadline
        transaction.delete(_TIME.pack(at) + key, db=self._deadlines)
        return None

    def _remove(self, transaction: lmdb.Transaction, key: bytes) -> None:
        """Removes a session from all databases."""
        old: Any = transaction.get(key, db=self._sessions)
        _, _, _, indexed, _, size, origin, length = _HEADER.unpack_from(old)
        client = bytes(old[_HEADER.size + origin : _HEADER.size + origin + length])
        transaction.delete(key, db=self._sessions)
        transaction.delete(_TIME.pack(indexed) + key, db=self._deadlines)
        transaction.delete(client + b"\0" + key, db=self._of_client)
        self._add_to_total(transaction, client, -1, -size)

    def _total(self, transaction: lmdb.Transaction, client: bytes) -> tuple[int, int]:
        value = transaction.get(b"/" + client, db=self._totals)  # keys are not empty
        return (0, 0) if value is None else _TOTAL.unpack(value)

    def _add_to_total(self, transaction: lmdb.Transaction, client: bytes, sessions: int, state_bytes: int) -> None:
        count, size = self._total(transaction, client)
        if count + sessions:
            total = _TOTAL.pack(count + sessions, max(0, size + state_bytes))
            transaction.put(b"/" + client, total, db=self._totals)
        else:
            transaction.delete(b"/" + client, db=self._totals)

    def _bury(self, transaction: lmdb.Transaction, key: bytes, reason: str, position: int, now: float) -> None:
        self._remove(transaction, key)
        until = now + self._tombstone_seconds
        transaction.put(key, _TOMBSTONE.pack(until, position, _REASONS.index(reason)), db=self._tombstones)
        transaction.put(_TIME.pack(until) + key, b"", db=self._forgetting)

    def _tombstone(self, transaction: lmdb.Transaction, key: bytes, now: float) -> TombstoneRecord | None:
        value = transaction.get(key, db=self._tombstones)
        if value is None:
            return None
        until, position, reason = _TOMBSTONE.unpack(value)
        return TombstoneRecord(_REASONS[reason], position) if until > now else None

    def _model(self, transaction: lmdb.Transaction, number: int) -> tuple[str, int, str]:
        """Returns the name, version and digest of a model by its number."""
        known = self._known_models.get(number)
        if known is None:
            value: Any = transaction.get(b"#" + _NUMBER.pack(number), db=self._models)
            name, version, digest = bytes(value).split(b"\0")
            known = self._known_models[number] = name.decode(), int(version), digest.decode()
        return known

    def _model_number(self, transaction: lmdb.Transaction, record: SessionRecord) -> int:
        """Returns the number of a session's model, after adding it if necessary."""
        name = f"{record.model}\0{record.version}\0{record.digest}".encode()
        value = transaction.get(name[-64:] + name[:-64][:400], db=self._models)
        if value is not None:
            return int(_NUMBER.unpack(value)[0])
        number = transaction.stat(self._models)["entries"] // 2
        transaction.put(name[-64:] + name[:-64][:400], _NUMBER.pack(number), db=self._models)
        transaction.put(b"#" + _NUMBER.pack(number), name, db=self._models)
        return int(number)


def to_key(key: str) -> bytes:
    """Returns the key in the store of a session: its owner, which may be empty, a slash, and its id."""
    return (key if "/" in key else f"/{key}").encode()


def from_key(key: bytes) -> str:
    """Returns the key of which `to_key` makes this one."""
    return key.decode().removeprefix("/")
