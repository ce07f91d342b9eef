"""The shared store: sessions in Redis or Valkey, so that any replica can serve any of them.

A session is a hash; a write to it is one call of a script that compares position and revision with those that the
writer has seen, and sets all of it or nothing. Beside it stands a key that outlives it and tells what has become of it.
Both keys share a hash tag. A sorted set by deadline knows all sessions.
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

from cellserve.service.errors import StoreAway
from cellserve.service.sessions.stores.protocol import StoreUnusable
from cellserve.service.sessions.stores.records import Fate, Stored, Write

_CLUSTER = "redis+cluster://"
_INDEX = "cellserve:sessions"
_INDEX_SLACK = 1.1

Command = tuple[Any, ...]  # its name and its arguments: bytes, strings and numbers

# KEYS: the session, what became of it. ARGV: the mark that is expected, the new one, milliseconds until it expires and
# until that is forgotten, what will have become of it, its states, and the last change where that is new.
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
# KEYS as above. ARGV: the two times, what will have become of it, then fields and values.
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
# The same, whatever is or was there.
_REPLACE = b"redis.call('DEL', KEYS[1], KEYS[2])\n" + _CREATE
# KEYS as above. ARGV: the reason, milliseconds until that is forgotten, the position that is expected, or nothing.
_END = b"""
local mark = redis.call('HGET', KEYS[1], 'mark')
if not mark then return 'gone' end
local position = string.match(mark, '^%d+')
if ARGV[3] ~= '' and ARGV[3] ~= position then return 'other' end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. position, 'PX', ARGV[2])
return 'written'
"""

log = logging.getLogger("cellserve")


class RedisClient:
    """Sessions in Redis or Valkey.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py takes it; `redis+cluster://` for a cluster.
        idle_seconds: A session not written or read for so long expires.
        tombstone_seconds: For how long it is told of a session that it is gone.
        timeout_seconds: For how long an answer is waited for.
        replicas: Of the store's own, that must have a write before it is answered (`WAIT`).

    Raises:
        StoreUnusable: The address is none.
    """

    def __init__(
        self, url: str, idle_seconds: float, tombstone_seconds: float, timeout_seconds: float, replicas: int
    ) -> None:
        # Nothing is sent again by the client: whether a write that had no answer was applied must be looked up.
        how: dict[str, Any] = {"socket_timeout": timeout_seconds, "socket_connect_timeout": timeout_seconds}
        how["retry"] = Retry(NoBackoff(), 0)
        self._cluster = url.startswith(_CLUSTER)
        if self._cluster and replicas:
            raise StoreUnusable(f"--store-replicas cannot be asked of a cluster: use {_CLUSTER} without it")
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
        self.errors = 0  # how often it did not answer, so far
        self._offset = 0.0  # of the store's clock against ours, seconds
        self._scripts: dict[bytes, str] = {
            script: hashlib.sha1(script).hexdigest() for script in (_WRITE, _CREATE, _REPLACE, _END)
        }

    async def start(self) -> None:
        """Looks the store over, and warns where it may lose what it has acknowledged; raises StoreAway."""
        async with self._asking():
            for script in self._scripts:
                await self._redis.script_load(script)
            told = await self._redis.time()
            seconds, micros = next(iter(told.values())) if isinstance(told, dict) else told
            self._offset = seconds + micros / 1e6 - time.time()
        try:
            told = await self._redis.config_get("maxmemory-policy", "appendonly")
        except RedisError:
            return  # a hosted store may not tell
        if told.get("maxmemory-policy", "noeviction") != "noeviction":
            log.warning("the store evicts sessions when its memory is full: set maxmemory-policy noeviction")
        if told.get("appendonly") == "no":
            log.warning("the store keeps no append-only file: a restart of it loses sessions; set appendonly yes")

    async def close(self) -> None:
        """Ends the connections."""
        await self._redis.aclose()

    async def load(self, key: str) -> Stored | Fate | None:
        """Reads a session, and counts as using it; gives its fate where it is gone, None where none was ever there."""
        async with self._asking():
            pipeline = self._redis.pipeline(transaction=False)
            session, fate = _names(key)
            pipeline.hmget(session, Stored.FIELDS)
            pipeline.get(fate)
            pipeline.pexpire(session, self._idle_ms)
            pipeline.pexpire(fate, self._idle_ms + self._gone_ms)
            pipeline.zadd(_INDEX, {key: self._deadline()}, xx=True)
            values, told, *_ = await pipeline.execute()
        if values[0] is not None:
            return Stored.read(values)
        return None if told is None else Fate.read(told)

    async def create(self, key: str, session: Stored) -> str:
        """Makes a session: `written`, `there` where it is already, `gone` where it was."""
        return await self._create(_CREATE, key, session)

    async def replace(self, key: str, session: Stored) -> None:
        """Makes a session in place of whatever is or was there."""
        await self._create(_REPLACE, key, session)

    async def _create(self, script: bytes, key: str, session: Stored) -> str:
        times = self._idle_ms, self._idle_ms + self._gone_ms
        call = self._call(script, key, *times, b"expired %d" % session.mark.position, *session.fields())
        (outcome,) = await self._run(script, [call])
        if outcome == "written":
            await self.used([key])
        return outcome

    async def write(self, writes: Sequence[Write], used: Iterable[str] = ()) -> list[str]:
        """Writes some sessions in one round trip, and moves deadlines in the set of all sessions.

        Returns:
            For each write `written`, `other` where the session is another by now, or `gone`.
        """
        idle, gone = self._idle_ms, self._idle_ms + self._gone_ms
        calls = []
        for one in writes:
            mark = one.mark
            last = () if one.last is None else (bytes(one.last),)
            fate = b"expired %d" % mark.position
            told = bytes(one.seen), bytes(mark), idle, gone, fate, one.states, *last
            calls.append(self._call(_WRITE, one.key, *told))
        return await self._run(_WRITE, calls, used)

    async def end(self, key: str, reason: str, position: int | None = None) -> str:
        """Ends a session: `written`, `other` where it is not at the position, or `gone`."""
        call = self._call(_END, key, reason, self._gone_ms, "" if position is None else position)
        (outcome,) = await self._run(_END, [call])
        if outcome == "written":
            async with self._asking():
                await self._redis.zrem(_INDEX, key)
        return outcome

    async def used(self, keys: Iterable[str]) -> None:
        """Moves deadlines in the set of all sessions."""
        async with self._asking():
            await self._redis.execute_command(*self._deadlines(keys))

    async def count(self) -> tuple[int, int]:
        """Counts the sessions whose deadline has not come, and those whose has, which no later call counts again."""
        async with self._asking():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.zremrangebyscore(_INDEX, "-inf", self._now())
            pipeline.zcard(_INDEX)
            expired, live = await pipeline.execute()
            return int(live), int(expired)

    async def longest_idle(self) -> str | None:
        """Gives the key of the session whose deadline comes first."""
        async with self._asking():
            found = await self._redis.zrange(_INDEX, 0, 0)
        return found[0].decode() if found else None

    async def page(self, prefix: str, cursor: int, limit: int) -> tuple[list[tuple[str, str, int, int]], int]:
        """Gives about so many sessions whose keys begin so, as key, model, version and position; and where to go on."""
        found: list[tuple[str, str, int, int]] = []
        while True:
            async with self._asking():
                match = f"{prefix}*" if prefix else None
                cursor, members = await self._redis.zscan(_INDEX, cursor, match=match, count=limit)
                keys = [member.decode() for member, _ in members]
                pipeline = self._redis.pipeline(transaction=False)
                for key in keys:
                    pipeline.hmget(_names(key)[0], "model", "version", "mark")
                told = await pipeline.execute()
            found += [
                (key, values[0].decode(), int(values[1]), int(values[2].partition(b" ")[0]))
                for key, values in zip(keys, told, strict=True)
                if values[0] is not None
            ]
            if not cursor or len(found) >= limit:
                return found, cursor

    def _now(self) -> float:
        return time.time() + self._offset

    def _deadline(self) -> float:
        # A little late: whoever steps a session all the time moves it now and then only.
        return self._now() + _INDEX_SLACK * self._idle_ms / 1000

    def _deadlines(self, keys: Iterable[str]) -> Command:
        deadline = self._deadline()
        return "ZADD", _INDEX, *(part for key in keys for part in (deadline, key))

    def _call(self, script: bytes, key: str, *arguments: bytes | str | int) -> Command:
        return "EVALSHA", self._scripts[script], 2, *_names(key), *arguments

    async def _run(self, script: bytes, calls: Sequence[Command], used: Iterable[str] = ()) -> list[str]:
        """Calls a script for some sessions, in one round trip."""
        commands = [*calls, self._deadlines(used)] if used else calls
        async with self._asking():
            told = (await self._pipelined(commands))[: len(calls)]
            missed = [place for place, one in enumerate(told) if isinstance(one, NoScriptError)]
            if missed:  # the store was restarted, or its scripts flushed: of these calls nothing was applied
                await self._redis.script_load(script)
                for place, one in zip(missed, await self._pipelined([calls[p] for p in missed]), strict=False):
                    told[place] = one
            for one in told:
                if isinstance(one, Exception):
                    raise one
            return [one.decode() for one in told]

    async def _pipelined(self, commands: Sequence[Command]) -> list[Any]:
        """Sends commands at once and gives what each was told: an answer, or the error."""
        if self._cluster:
            pipeline = self._redis.pipeline()
            for command in commands:
                pipeline.execute_command(*command)
            return list(await pipeline.execute(raise_on_error=False))
        if self._replicas:
            commands = [*commands, ("WAIT", self._replicas, int(1000 * self._timeout))]
        # What redis-py's pipeline does, in a third of its time (4 µs a write for 13): hiredis packs, and one timeout.
        packed = b"".join([hiredis.pack_command(command) for command in commands])
        pool, told = self._redis.connection_pool, []
        connection = await pool.get_connection()
        try:
            async with asyncio.timeout(2 * self._timeout if self._replicas else self._timeout):
                await connection.send_packed_command(packed, check_health=False)
                for _ in commands:
                    try:
                        told.append(await connection.read_response(disable_decoding=True, timeout=math.inf))
                    except ResponseError as error:
                        told.append(error)
        finally:
            await pool.release(connection)
        if self._replicas and not isinstance(told[-1], Exception) and told[-1] < self._replicas:
            raise TimeoutError(f"fewer than {self._replicas} replicas of the store have the write")
        return told

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        try:
            yield
            if self._away:
                self._away = False
                log.info("the store answers again")
        except (ConnectionError, TimeoutError, ResponseError, RedisClusterException, OSError) as error:
            self.errors += 1
            if not self._away:  # once, not for each request
                self._away = True
                log.error("the store does not answer: %s", error or type(error).__name__)
            raise StoreAway(
                "the store of sessions does not answer: send the request again in a second (with its position, so "
                "that it is applied once)"
            ) from None


def _names(key: str) -> tuple[str, str]:
    return f"cellserve:{{{key}}}:session", f"cellserve:{{{key}}}:fate"
