"""The Redis client: sessions in Redis or Valkey, so that any replica can serve any of them.

A session is a hash. A write is one call of a script that compares the stored position and revision with those that the
writer has seen, and sets all fields or none. A second key outlives the session and becomes its tombstone; both keys
share a hash tag. The index, a sorted set by deadline, lists all sessions.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import hiredis
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ConnectionError,
    NoScriptError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
)

from cellserve.service.errors import StoreUnavailable
from cellserve.service.sessions.session import Durable
from cellserve.service.sessions.stores.protocol import StoreUnusable
from cellserve.service.sessions.stores.records import ConditionalWrite, SessionRecord, TombstoneRecord, WriteOutcome

_CLUSTER = "redis+cluster://"
_INDEX = "cellserve:sessions"
_INDEX_SLACK = 1.1

Command = tuple[Any, ...]  # name and arguments: bytes, strings and numbers

# KEYS: the session, its tombstone. ARGV: the expected stamp, the new stamp, milliseconds until the session expires and
# until the tombstone does, the tombstone, the states, and the stored answer if it changes.
_WRITE = b"""
local now = redis.call('HGET', KEYS[1], 'mark')
if not now then return 'gone' end
if now ~= ARGV[1] then return 'other' end
if ARGV[7] then
  redis.call('HSET', KEYS[1], 'mark', ARGV[2], 'states', ARGV[6], 'last', ARGV[7])
else
  redis.call('HSET', KEYS[1], 'mark', ARGV[2], 'states', ARGV[6])
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SET', KEYS[2], ARGV[5], 'PX', ARGV[4])
return 'written'
"""
# KEYS: as above. ARGV: the two times, the tombstone, then fields and values.
_CREATE = b"""
if redis.call('EXISTS', KEYS[1]) == 1 then return 'there' end
if redis.call('EXISTS', KEYS[2]) == 1 then return 'gone' end
local fields = {}
for place = 4, #ARGV do fields[place - 3] = ARGV[place] end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2])
return 'written'
"""
# The same, replacing a session or tombstone.
_REPLACE = b"redis.call('DEL', KEYS[1], KEYS[2])\n" + _CREATE
# KEYS: as above. ARGV: the reason, milliseconds until the tombstone expires, the expected position or nothing.
_END = b"""
local mark = redis.call('HGET', KEYS[1], 'mark')
if not mark then return 'gone' end
local position = string.match(mark, '^%d+')
if ARGV[3] ~= '' and ARGV[3] ~= position then return 'other' end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. position, 'PX', ARGV[2])
return 'written'
"""

_OUTCOMES = {outcome.encode(): outcome for outcome in WriteOutcome}

log = logging.getLogger("cellserve")


class RedisClient:
    """Sessions in Redis or Valkey.

    Args:
        url: A redis-py URL: `redis://`, `rediss://` or `unix://`; or `redis+cluster://` for a cluster.
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
        # The client must not retry: whether a write without an answer was applied has to be looked up.
        how: dict[str, Any] = {"socket_timeout": timeout_seconds, "socket_connect_timeout": timeout_seconds}
        how["retry"] = Retry(NoBackoff(), 0)
        self._cluster = url.startswith(_CLUSTER)
        if self._cluster and replicas:
            raise StoreUnusable(f"--store-replicas does not work with a cluster: use {_CLUSTER} without it")
        try:
            if self._cluster:
                self._redis: Any = RedisCluster.from_url(url.replace(_CLUSTER, "redis://", 1), **how)
            else:
                self._redis = Redis.from_url(url, **how)
        except ValueError as error:
            raise StoreUnusable(f"--store: {error}: send memory or redis://HOST:PORT/DB") from None
        self._idle_ms = max(1, int(1000 * idle_seconds))
        self._gone_ms = max(1, int(1000 * tombstone_seconds))
        self._timeout = timeout_seconds
        self._replicas = replicas
        self._away = False
        self.errors = {"away": 0}  # calls that failed so far
        self._offset = 0.0  # seconds that Redis's clock is ahead of ours
        self._scripts: dict[bytes, str] = {
            script: hashlib.sha1(script).hexdigest() for script in (_WRITE, _CREATE, _REPLACE, _END)
        }

    async def start(self) -> None:
        """Loads the scripts, and warns if Redis may lose acknowledged writes; raises StoreUnavailable."""
        async with self._translating_errors():
            for script in self._scripts:
                await self._redis.script_load(script)
            now = await self._redis.time()
            seconds, micros = next(iter(now.values())) if isinstance(now, dict) else now
            self._offset = seconds + micros / 1e6 - time.time()
        try:
            config = await self._redis.config_get("maxmemory-policy", "appendonly")
        except RedisError:
            return  # a hosted Redis may not answer this
        if config.get("maxmemory-policy", "noeviction") != "noeviction":
            log.warning("the store evicts sessions when its memory is full: set maxmemory-policy noeviction")
        if config.get("appendonly") == "no":
            log.warning("the store has no append-only file, so a restart loses sessions: set appendonly yes")

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.aclose()

    async def load(self, key: str) -> SessionRecord | TombstoneRecord | None:
        """Reads a session, or its tombstone, and extends its life; returns None if the key is unknown."""
        async with self._translating_errors():
            pipeline = self._redis.pipeline(transaction=False)
            session, tombstone = _names(key)
            pipeline.hmget(session, SessionRecord.FIELDS)
            pipeline.get(tombstone)
            pipeline.pexpire(session, self._idle_ms)
            pipeline.pexpire(tombstone, self._idle_ms + self._gone_ms)
            pipeline.zadd(_INDEX, {key: self._deadline()}, xx=True)
            values, ended, *_ = await pipeline.execute()
        if values[0] is not None:
            return SessionRecord.read(values)
        return None if ended is None else TombstoneRecord.read(ended)

    async def create(self, key: str, session: SessionRecord) -> WriteOutcome:
        """Creates a session: WRITTEN, EXISTS, or GONE if it has ended."""
        return await self._create(_CREATE, key, session)

    async def replace(self, key: str, session: SessionRecord) -> None:
        """Creates a session, replacing any existing or ended one."""
        await self._create(_REPLACE, key, session)

    async def _create(self, script: bytes, key: str, session: SessionRecord) -> WriteOutcome:
        times = self._idle_ms, self._idle_ms + self._gone_ms
        call = self._call(script, key, *times, b"expired %d" % session.stamp.position, *session.fields())
        (outcome,) = await self._run(script, [call])
        if outcome is WriteOutcome.WRITTEN:
            await self.touch([key])
        return outcome

    async def write(self, writes: Sequence[ConditionalWrite], touched: Iterable[str] = ()) -> list[WriteOutcome]:
        """Writes sessions in one round trip, and refreshes deadlines in the index.

        Args:
            writes: The writes.
            touched: Keys whose deadlines are refreshed.

        Returns:
            The outcome of each write: WRITTEN, CONFLICT or GONE.
        """
        idle, gone = self._idle_ms, self._idle_ms + self._gone_ms
        calls = []
        for one in writes:
            stamp = one.stamp
            last = () if one.last is None else (bytes(one.last),)
            tombstone = b"expired %d" % stamp.position
            arguments = bytes(one.expected), bytes(stamp), idle, gone, tombstone, one.states, *last
            calls.append(self._call(_WRITE, one.key, *arguments))
        return await self._run(_WRITE, calls, touched)

    async def end(self, key: str, reason: str, position: int | None = None) -> WriteOutcome:
        """Ends a session: WRITTEN, CONFLICT if it is not at the position, or GONE."""
        call = self._call(_END, key, reason, self._gone_ms, "" if position is None else position)
        (outcome,) = await self._run(_END, [call])
        if outcome is WriteOutcome.WRITTEN:
            async with self._translating_errors():
                await self._redis.zrem(_INDEX, key)
        return outcome

    async def touch(self, keys: Iterable[str]) -> None:
        """Refreshes deadlines in the index."""
        async with self._translating_errors():
            await self._redis.execute_command(*self._deadlines(keys))

    async def count(self) -> tuple[int, int]:
        """Returns the number of live sessions, and of those that have expired since the last call of any client."""
        async with self._translating_errors():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.zremrangebyscore(_INDEX, "-inf", self._now())
            pipeline.zcard(_INDEX)
            expired, live = await pipeline.execute()
            return int(live), int(expired)

    async def longest_idle(self) -> str | None:
        """Returns the key of the session with the earliest deadline."""
        async with self._translating_errors():
            found = await self._redis.zrange(_INDEX, 0, 0)
        return found[0].decode() if found else None

    async def page(self, prefix: str, cursor: int, limit: int) -> tuple[list[tuple[str, str, int, int]], int]:
        """Returns about `limit` sessions by key prefix, as key, model, version and position, and the next cursor."""
        found: list[tuple[str, str, int, int]] = []
        while True:
            async with self._translating_errors():
                match = f"{prefix}*" if prefix else None
                cursor, members = await self._redis.zscan(_INDEX, cursor, match=match, count=limit)
                keys = [member.decode() for member, _ in members]
                pipeline = self._redis.pipeline(transaction=False)
                for key in keys:
                    pipeline.hmget(_names(key)[0], "model", "version", "mark")
                fields = await pipeline.execute()
            found += [
                (key, values[0].decode(), int(values[1]), int(values[2].partition(b" ")[0]))
                for key, values in zip(keys, fields, strict=True)
                if values[0] is not None
            ]
            if not cursor or len(found) >= limit:
                return found, cursor

    def _now(self) -> float:
        return time.time() + self._offset

    def _deadline(self) -> float:
        # A little late, since the deadline of a session in constant use is refreshed only now and then.
        return self._now() + _INDEX_SLACK * self._idle_ms / 1000

    def _deadlines(self, keys: Iterable[str]) -> Command:
        deadline = self._deadline()
        return "ZADD", _INDEX, *(part for key in keys for part in (deadline, key))

    def _call(self, script: bytes, key: str, *arguments: bytes | str | int) -> Command:
        return "EVALSHA", self._scripts[script], 2, *_names(key), *arguments

    async def _run(self, script: bytes, calls: Sequence[Command], touched: Iterable[str] = ()) -> list[WriteOutcome]:
        """Calls a script for several sessions in one round trip."""
        commands = [*calls, self._deadlines(touched)] if touched else calls
        async with self._translating_errors():
            replies = (await self._pipelined(commands))[: len(calls)]
            missed = [place for place, one in enumerate(replies) if isinstance(one, NoScriptError)]
            if missed:  # Redis was restarted, or its scripts flushed: none of these calls was applied
                await self._redis.script_load(script)
                for place, one in zip(missed, await self._pipelined([calls[p] for p in missed]), strict=False):
                    replies[place] = one
            for one in replies:
                if isinstance(one, Exception):
                    raise one
            return [_OUTCOMES[one] for one in replies]

    async def _pipelined(self, commands: Sequence[Command]) -> list[Any]:
        """Sends commands together and returns the reply of each: a value, or the error."""
        if self._cluster:
            pipeline = self._redis.pipeline()
            for command in commands:
                pipeline.execute_command(*command)
            return list(await pipeline.execute(raise_on_error=False))
        if self._replicas:
            commands = [*commands, ("WAIT", self._replicas, int(1000 * self._timeout))]
        # As redis-py's pipeline, in a third of its time (4 µs per write instead of 13): packed by hiredis, one timeout.
        packed = b"".join([hiredis.pack_command(command) for command in commands])
        pool, replies = self._redis.connection_pool, []
        connection = await pool.get_connection()
        try:
            async with asyncio.timeout(2 * self._timeout if self._replicas else self._timeout):
                await connection.send_packed_command(packed, check_health=False)
                for _ in commands:
                    try:
                        replies.append(await connection.read_response(disable_decoding=True, timeout=math.inf))
                    except ResponseError as error:
                        replies.append(error)
        finally:
            await pool.release(connection)
        if self._replicas and not isinstance(replies[-1], Exception) and replies[-1] < self._replicas:
            raise TimeoutError(f"fewer than {self._replicas} replicas of the store have the write")
        return replies

    @asynccontextmanager
    async def _translating_errors(self) -> AsyncIterator[None]:
        """Turns errors of Redis into StoreUnavailable."""
        try:
            yield
            if self._away:
                self._away = False
                log.info("the store answers again")
        except (ConnectionError, TimeoutError, ResponseError, RedisClusterException, OSError) as error:
            self.errors["away"] += 1
            if not self._away:  # logged once, not for each request
                self._away = True
                log.error("the store does not answer: %s", error or type(error).__name__)
            raise StoreUnavailable(
                "the session store does not answer: send the request again in a second (with its position, so that it "
                "is applied only once)"
            ) from None


def _names(key: str) -> tuple[str, str]:
    return f"cellserve:{{{key}}}:session", f"cellserve:{{{key}}}:fate"
