"""The Redis client: sessions in Redis or Valkey, so that any replica can serve any of them.

A write is a call of a script that compares the stored position and revision with those that the writer has seen, and
sets all fields of a session or none. One call writes many sessions, which costs less in both processes, unless their
keys may be on several nodes. `redis_scripts` describes the keys.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from redis.exceptions import ResponseError

from cellserve.service.errors import Problem, StoreUnavailable
from cellserve.service.sessions.session import ClientLimits, Durable, Room, SessionSummary
from cellserve.service.sessions.stores import redis_scripts as scripts
from cellserve.service.sessions.stores.protocol import StoreUnusable
from cellserve.service.sessions.stores.records import (
    NO_STAMP,
    ConditionalWrites,
    SessionRecord,
    TombstoneRecord,
    UnreadableRecord,
    VersionStamp,
    WriteOutcome,
)
from cellserve.service.sessions.stores.redis_connection import Command, RedisConnection, checked, is_wrong_type
from cellserve.service.sessions.stores.redis_faults import FAULTS, TooFewReplicas, fault_of

# The deadlines of a session in constant use are set again only now and then: that in Redis when less than the idle time
# is left, that in the index by `SharedStore`. So neither is early, and that of the index is the later one.
_SLACK, _INDEX_SLACK = 1.1, 1.2
_TOGETHER = 64  # sessions that one call writes, at most: Redis does nothing else meanwhile
_TOGETHER_BYTES = 1024 * 1024  # of their states
_OUTCOMES: dict[bytes, WriteOutcome] = {outcome.encode(): outcome for outcome in WriteOutcome}
_PROBE = "cellserve:probe"  # an index of its own, and an owner that there cannot be
_PROBE_ROOM = Room(1_000_000_000, _PROBE, ClientLimits(1_000_000_000, 1_000_000_000))

log = logging.getLogger("cellserve")


class RedisClient:
    """Sessions in Redis or Valkey; a `StoreClient`. Every call raises StoreUnavailable if it fails.

    Args:
        url: What `redis_url.connect` takes.
        idle_seconds: A session not written or read for so long expires.
        tombstone_seconds: How long ended sessions are answered 410 instead of 404.
        timeout_seconds: Timeout of a call.
        replicas: Redis replicas that must have a write before it counts as written (`WAIT`).

    Raises:
        StoreUnusable: The URL is invalid.
    """

    durable: Durable = "store"

    def __init__(
        self, url: str, idle_seconds: float, tombstone_seconds: float, timeout_seconds: float, replicas: int
    ) -> None:
        self._connection = RedisConnection(url, timeout_seconds)
        if self._connection.is_cluster and replicas:
            raise StoreUnusable("--store-replicas does not work with a cluster: leave it out")
        self._idle_ms = max(1, int(1000 * idle_seconds))
        self._life_ms = math.ceil(_SLACK * self._idle_ms)
        self._gone_ms = max(1, int(1000 * tombstone_seconds))
        self._index_seconds = _INDEX_SLACK * self._idle_ms / 1000
        self._replicas = replicas
        # Sessions per call; None until it is known whether Redis, or a proxy before it, takes keys of several sessions.
        self._together: int | None = 1 if self._connection.is_cluster else None
        self._expired = 0  # sessions that calls of this client found expired, since the last `count`

    @property
    def errors(self) -> Mapping[str, int]:
        """Calls that failed so far, by reason."""
        return self._connection.errors

    async def start(self) -> None:
        """Connects, and warns if Redis may lose acknowledged writes."""
        await self._call_index(scripts.COUNT)
        try:
            config = await self._connection.redis.config_get("maxmemory-policy", "appendonly")
        except FAULTS:
            return  # a hosted Redis may not answer this
        if config.get("maxmemory-policy", "noeviction") != "noeviction":
            log.warning("the store evicts sessions when its memory is full: set maxmemory-policy noeviction")
        if config.get("appendonly") == "no":
            log.warning("the store has no append-only file, so a restart loses sessions: set appendonly yes")

    async def check(self) -> None:
        """Tries everything once that a session needs; one that cannot be reached now counts as usable.

        Raises:
            StoreUnusable: It will not do, unless its settings or ours are changed.
        """
        key = f"{_PROBE}/{secrets.token_hex(8)}"
        session = SessionRecord("probe", 1, "", b"", VersionStamp(0, bytes(16)), b"")
        commands = [
            self._of_index(scripts.ADMIT, *self._admission(key, session, _PROBE_ROOM), index=_PROBE),
            self._creation(scripts.CREATE, key, session),
            self._touch([key], "", _PROBE),
            self._writing(ConditionalWrites([key], [session.stamp.packed], [session.stamp.packed], [b""], [b""])),
            *self._loading(key, _PROBE),
            self._of_index(scripts.PAGE, _PROBE, 0, 1, index=_PROBE),
            self._of_index(scripts.COUNT, index=_PROBE),
            self._of_index(scripts.LONGEST_IDLE, index=_PROBE),
            self._ending(key, "deleted", None),
            self._of_index(scripts.DROP, key, index=_PROBE),
            ("DEL", scripts.names(key)[1]),
            *self._waiting(),
        ]
        try:
            await self._connection.load_scripts()
            await self._connection.attempt(commands, lambda replies: [checked(reply) for reply in replies])
        except FAULTS as error:
            fault = fault_of(error)
            if fault.lasts:
                raise StoreUnusable(f"--store: {fault.told}") from None

    async def leave_to_workers(self) -> None:
        """Has nothing open before it is used."""

    async def close(self) -> None:
        """Closes the connections."""
        await self._connection.close()

    # Sessions

    async def load(self, key: str) -> SessionRecord | TombstoneRecord | None:
        """Reads a session, or its tombstone, and extends its life; returns None if the key is unknown.

        Raises:
            UnreadableRecord: There is something else under its name.
        """

        def read(replies: list[Any]) -> tuple[list[bytes | None] | ResponseError, bytes | ResponseError | None]:
            values, ended, *_ = (one if is_wrong_type(one) else checked(one) for one in replies[:4])
            if not isinstance(values, ResponseError) and len(values) != len(SessionRecord.FIELDS):
                raise ValueError("not the values of the fields")
            return values, ended

        values, ended = await self._connection.call(self._loading(key), read)
        if isinstance(values, ResponseError) or any(value is not None for value in values):
            if isinstance(values, ResponseError):
                raise UnreadableRecord("it is not a hash")
            return SessionRecord.read(values)
        if isinstance(ended, ResponseError):
            raise UnreadableRecord("it has neither a session nor how one ended")
        return None if ended is None else TombstoneRecord.read(ended)

    async def create(self, key: str, session: SessionRecord, room: Room) -> WriteOutcome:
        """Creates a session: WRITTEN, EXISTS, GONE if it has ended, FULL, or CROWDED by its client."""
        return await self._create(scripts.CREATE, key, session, room)

    async def replace(self, key: str, session: SessionRecord, room: Room) -> WriteOutcome:
        """Creates a session, replacing any existing or ended one: WRITTEN, or FULL or CROWDED if there was none."""
        return await self._create(scripts.REPLACE, key, session, room)

    async def _create(self, script: bytes, key: str, session: SessionRecord, room: Room) -> WriteOutcome:
        # In the index first, so that there are never more sessions than allowed. If the second call is lost, the place
        # stays taken until it expires.
        admission = self._admission(key, session, room)
        admitted = await self._call_index(scripts.ADMIT, *admission)
        if admitted != 1:
            return WriteOutcome.CROWDED if admitted else WriteOutcome.FULL
        (outcome,) = await self._run([self._creation(script, key, session)])
        if outcome is not WriteOutcome.WRITTEN and outcome is not WriteOutcome.EXISTS:
            await self._drop(key)
        return _raised(outcome)

    async def write(self, writes: ConditionalWrites, touched: Sequence[str] = ()) -> list[WriteOutcome | Problem]:
        """Writes sessions in one round trip, and refreshes deadlines in the index.

        Args:
            writes: The writes.
            touched: Keys whose deadlines are refreshed.

        Returns:
            The outcome of each write: WRITTEN, CONFLICT or GONE, or the problem if Redis refuses it.
        """
        if self._together is None and len(writes) > 1:
            await self._learn_together()
        largest = max(map(len, writes.states), default=0)
        rows = max(1, min(self._together or 1, _TOGETHER_BYTES // max(1, largest)))
        parts = [writes]
        if len(writes) > rows:
            starts = range(0, len(writes), rows)
            parts = [writes.take(range(start, min(start + rows, len(writes)))) for start in starts]
        return await self._run([self._writing(part) for part in parts], touched, list(map(len, parts)))

    async def _learn_together(self) -> None:
        """Finds out whether a call may write several sessions: with two that there are not."""
        keys = [f"{_PROBE}/{name}" for name in "ab"]
        probes = ConditionalWrites(keys, [NO_STAMP] * 2, [NO_STAMP] * 2, [b""] * 2, [b""] * 2)
        with suppress(*FAULTS):
            replies, _ = await self._connection.attempt([self._writing(probes)], lambda replies: None)
            self._together = 1 if isinstance(replies[0], ResponseError) else _TOGETHER

    async def end(self, key: str, reason: str, position: int | None = None) -> WriteOutcome:
        """Ends a session: WRITTEN, CONFLICT if it is not at the position, or GONE."""
        (outcome,) = await self._run([self._ending(key, reason, position)])
        if _raised(outcome) is not WriteOutcome.CONFLICT:
            await self._drop(key)
        return _raised(outcome)

    # The index of all sessions

    async def count(self) -> tuple[int, int]:
        """Returns the number of live sessions, and of those that have expired since the last call of any client."""
        live = await self._call_index(scripts.COUNT)
        expired, self._expired = self._expired, 0
        return live, expired

    async def longest_idle(self, client: str | None = None) -> str | None:
        """Returns the key of the session with the earliest deadline, of all or of those that a client has made."""
        which = () if client is None else (client,)
        found = await self._connection.call(
            [self._of_index(scripts.LONGEST_IDLE, *which)], lambda replies: _keys(replies[0])
        )
        return found[0] if found else None

    async def page(self, owner: str, after: int, limit: int) -> tuple[list[SessionSummary | UnreadableRecord], int]:
        """Returns sessions of an owner in the order of their creation, and the number that the next page starts after.

        The number is 0 on the last page. Only there, or if sessions have ended meanwhile, are there fewer than `limit`.
        """
        found: list[SessionSummary | UnreadableRecord] = []
        while True:
            listing = self._of_index(scripts.PAGE, owner, after, limit - len(found))
            keys, after = await self._connection.call([listing], _listed)
            found += await self._summaries(keys)
            if not after or len(found) >= limit:
                return found, after

    async def _summaries(self, keys: list[str]) -> list[SessionSummary | UnreadableRecord]:
        commands = [("HMGET", scripts.names(key)[0], *SessionRecord.SUMMARY) for key in keys]
        if not commands:
            return []
        summaries: list[SessionSummary | UnreadableRecord] = []
        rows = await self._connection.call(
            commands, lambda replies: [() if is_wrong_type(one) else tuple(checked(one)) for one in replies]
        )
        for key, values in zip(keys, rows, strict=True):
            try:
                if not values:
                    raise UnreadableRecord("it is not a hash")
                if any(value is not None for value in values):  # otherwise it has ended meanwhile
                    summaries.append(SessionSummary(key.rpartition("/")[2], *SessionRecord.read_summary(list(values))))
            except UnreadableRecord as error:
                summaries.append(error)
        return summaries

    async def _call_index(self, script: bytes, *arguments: str | float) -> int:
        """Calls a script whose reply is a number, and how many sessions have expired; returns the first."""
        number, expired = await self._connection.call([self._of_index(script, *arguments)], _two_numbers)
        self._expired += expired
        return number

    async def _drop(self, key: str) -> None:
        await self._connection.call([self._of_index(scripts.DROP, key)], lambda replies: checked(replies[0]))

    # Commands

    def _admission(self, key: str, session: SessionRecord, room: Room) -> tuple[str | float, ...]:
        """Returns the arguments of ADMIT."""
        return key, self._index_seconds, room.max_sessions, room.client, len(session.states), *room.client_limits

    def _call(self, script: bytes, key: str, *arguments: bytes | str | int) -> Command:
        return "EVALSHA", scripts.SHA1[script], 2, *scripts.names(key), *arguments

    def _of_index(self, script: bytes, *arguments: str | float, index: str = scripts.INDEX) -> Command:
        return "EVALSHA", scripts.SHA1[script], 1, index, *arguments

    def _touch(self, keys: Iterable[str], which: str, index: str = scripts.INDEX) -> Command:
        return self._of_index(scripts.TOUCH, self._index_seconds, which, *keys, index=index)

    def _loading(self, key: str, index: str = scripts.INDEX) -> list[Command]:
        session, tombstone = scripts.names(key)
        return [
            ("HMGET", session, *SessionRecord.FIELDS),
            ("GET", tombstone),
            ("PEXPIRE", session, self._life_ms),
            ("PEXPIRE", tombstone, self._life_ms + self._gone_ms),
            self._touch([key], "XX", index),
        ]

    def _creation(self, script: bytes, key: str, session: SessionRecord) -> Command:
        times = self._life_ms, self._life_ms + self._gone_ms
        return self._call(script, key, *times, b"expired %d" % session.stamp.position, *session.fields())

    def _writing(self, writes: ConditionalWrites) -> Command:
        keys: list[str] = []
        arguments: list[bytes | int] = [self._life_ms, self._life_ms + self._gone_ms, self._idle_ms]
        rows = zip(writes.keys, writes.expected, writes.stamps, writes.states, writes.answers, strict=True)
        for key, expected, stamp, states, answer in rows:
            keys += scripts.names(key)
            before, after = VersionStamp.text_of(expected), VersionStamp.text_of(stamp)
            arguments += before, after, b"expired " + after.partition(b" ")[0], states, answer
        return "EVALSHA", scripts.SHA1[scripts.WRITE], len(keys), *keys, *arguments

    def _ending(self, key: str, reason: str, position: int | None) -> Command:
        return self._call(scripts.END, key, reason, self._gone_ms, "" if position is None else position)

    def _waiting(self) -> list[Command]:
        return [("WAIT", self._replicas, int(1000 * self._connection.timeout))] if self._replicas else []

    async def _run(
        self, calls: Sequence[Command], touched: Sequence[str] = (), sessions: Sequence[int] | None = None
    ) -> list[WriteOutcome | Problem]:
        """Calls scripts in one round trip; returns the outcomes of all their sessions, by default of one each."""
        # If the deadlines alone are refused, the sessions are written all the same.
        touching = [self._touch(touched, "")] if touched else []

        def read(replies: list[Any]) -> list[WriteOutcome | Problem]:
            if self._replicas and checked(replies[-1]) < self._replicas:
                raise TooFewReplicas()
            outcomes: list[WriteOutcome | Problem] = []
            for reply, count in zip(replies, [1] * len(calls) if sessions is None else sessions, strict=False):
                if isinstance(reply, ResponseError):
                    outcomes += [StoreUnavailable() for _ in range(count)]
                    continue
                words = reply.split()
                if len(words) != count:
                    raise ValueError("not an outcome for each session")
                outcomes += [_OUTCOMES[word] for word in words]
            return outcomes

        return await self._connection.call([*calls, *touching, *self._waiting()], read)


def _raised(outcome: WriteOutcome | Problem) -> WriteOutcome:
    """Returns an outcome; raises it if it is a problem."""
    if isinstance(outcome, Problem):
        raise outcome
    return outcome


def _two_numbers(replies: list[Any]) -> tuple[int, int]:
    first, second = checked(replies[0])
    return int(first), int(second)


def _keys(reply: Any) -> list[str]:
    return [member.decode() for member in checked(reply)]


def _listed(replies: list[Any]) -> tuple[list[str], int]:
    keys, after = checked(replies[0])
    # What is not a text is no session's key: it is looked for, not found, and so left out.
    return [member.decode(errors="replace") for member in keys], int(after)
