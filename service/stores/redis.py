"""The shared store: sessions in Redis or Valkey, so that any replica can serve any of them.

A session is a hash; a write to it is one call of a script that compares position and revision with those that the
writer has seen, and sets all of it or nothing. Beside it stands a key that outlives it and tells what has become of it.
Both keys share a hash tag. A sorted set by deadline knows all sessions.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, NoScriptError, RedisError, ResponseError, TimeoutError

from service.errors import StoreAway
from service.sessions import StoreUnusable

_INDEX = b"cellserve:sessions"
_INDEX_SLACK = 1.1
_FIELDS = ("model", "version", "digest", "position", "revision", "states", "origin",
           "asked", "asked_at", "reached", "y", "before")  # fmt: skip

# KEYS: the session, what became of it. ARGV: expected position and revision, milliseconds until it expires and until
# that is forgotten, then fields and values to set.
_WRITE = b"""
local now = redis.call('HMGET', KEYS[1], 'position', 'revision')
if not now[1] then return {'gone'} end
if now[1] ~= ARGV[1] or now[2] ~= ARGV[2] then return {'other'} end
local fields = {}
for place = 5, #ARGV do fields[place - 4] = ARGV[place] end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SET', KEYS[2], 'expired ' .. redis.call('HGET', KEYS[1], 'position'), 'PX', ARGV[4])
return {'written'}
"""
# KEYS as above. ARGV: the two times, then fields and values.
_CREATE = b"""
if redis.call('EXISTS', KEYS[1]) == 1 then return {'there'} end
local fate = redis.call('GET', KEYS[2])
if fate then return {'gone'} end
local fields = {}
for place = 3, #ARGV do fields[place - 2] = ARGV[place] end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], 'expired ' .. redis.call('HGET', KEYS[1], 'position'), 'PX', ARGV[2])
return {'written'}
"""
# KEYS as above. ARGV: the reason, milliseconds until that is forgotten, the position that is expected, or nothing.
_END = b"""
local position = redis.call('HGET', KEYS[1], 'position')
if not position then return {'gone'} end
if ARGV[3] ~= '' and ARGV[3] ~= position then return {'other'} end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. position, 'PX', ARGV[2])
return {'written'}
"""

log = logging.getLogger("cellserve")


@dataclass(frozen=True, slots=True)
class Stored:
    """A session as it stands in the store."""

    model: str
    version: int
    digest: str  # of the model
    position: int
    revision: bytes  # drawn anew by every write, so that another history at the same position is told apart
    states: bytes
    origin: bytes
    asked: bytes = b""  # digest of the last change with a position; empty where there was none
    asked_at: int = 0
    reached: int = 0  # the position after it
    y: bytes = b""  # what it was answered, or
    before: bytes = b""  # the states before it

    def fields(self) -> list[bytes | str | int]:
        """Gives it as names and values."""
        return [part for name in _FIELDS for part in (name, getattr(self, name))]


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a session that is not there any more."""

    reason: str
    position: int


@dataclass(frozen=True, slots=True)
class Write:
    """A change of a session: what it was, and what of it is to be set."""

    key: str
    position: int  # expected
    revision: bytes  # expected
    fields: dict[str, bytes | str | int]


class RedisStore:
    """Sessions in Redis or Valkey.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py takes it.
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
        try:
            self._redis: Any = Redis.from_url(
                url, socket_timeout=timeout_seconds, socket_connect_timeout=timeout_seconds, retry=Retry(NoBackoff(), 0)
            )
        except ValueError as error:
            raise StoreUnusable(f"--store: {error}: send memory or redis://HOST:PORT/DB") from None
        self._idle_ms = max(1, int(1000 * idle_seconds))
        self._gone_ms = max(1, int(1000 * tombstone_seconds))
        self._timeout_ms = max(1, int(1000 * timeout_seconds))
        self._replicas = replicas
        self._away = False
        self._offset = 0.0  # of the store's clock against ours, seconds
        self._scripts: dict[bytes, str] = {
            script: hashlib.sha1(script).hexdigest() for script in (_WRITE, _CREATE, _END)
        }

    async def start(self) -> None:
        """Looks the store over, and warns where it may lose what it has acknowledged; raises StoreAway."""
        async with self._asking():
            pipeline = self._redis.pipeline(transaction=False)
            for script in self._scripts:
                pipeline.script_load(script)
            pipeline.time()
            seconds, micros = (await pipeline.execute())[-1]
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
            pipeline.hmget(session, _FIELDS)
            pipeline.get(fate)
            pipeline.pexpire(session, self._idle_ms)
            pipeline.pexpire(fate, self._idle_ms + self._gone_ms)
            pipeline.zadd(_INDEX, {key: self._deadline()}, xx=True)
            values, told, *_ = await pipeline.execute()
        if values[0] is not None:
            return _stored(values)
        return None if told is None else Fate(told.split()[0].decode(), int(told.split()[1]))

    async def create(self, key: str, session: Stored) -> str:
        """Makes a session: `written`, `there` where it is already, `gone` where it was."""
        (outcome,) = await self._run(
            _CREATE, [(key, [self._idle_ms, self._idle_ms + self._gone_ms, *session.fields()])]
        )
        if outcome == "written":
            await self._index([key])
        return outcome

    async def write(self, writes: Sequence[Write]) -> list[str]:
        """Writes some sessions in one round trip; for each `written`, `other` where it is another by now, or `gone`."""
        times = self._idle_ms, self._idle_ms + self._gone_ms
        return await self._run(
            _WRITE,
            [
                (one.key, [one.position, one.revision, *times, *(part for item in one.fields.items() for part in item)])
                for one in writes
            ],
        )

    async def end(self, key: str, reason: str, position: int | None = None) -> str:
        """Ends a session: `written`, `other` where it is not at the position, or `gone`."""
        told: list[bytes | str | int] = [reason, self._gone_ms, "" if position is None else position]
        (outcome,) = await self._run(_END, [(key, told)])
        if outcome == "written":
            async with self._asking():
                await self._redis.zrem(_INDEX, key)
        return outcome

    async def used(self, keys: Sequence[str]) -> None:
        """Moves deadlines in the set of all sessions."""
        await self._index(keys)

    async def count(self) -> int:
        """Counts the sessions whose deadline has not come."""
        async with self._asking():
            await self._redis.zremrangebyscore(_INDEX, "-inf", self._now())
            return int(await self._redis.zcard(_INDEX))

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
                    pipeline.hmget(_names(key)[0], "model", "version", "position")
                told = await pipeline.execute()
            found += [
                (key, values[0].decode(), int(values[1]), int(values[2]))
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

    async def _index(self, keys: Sequence[str]) -> None:
        async with self._asking():
            await self._redis.zadd(_INDEX, dict.fromkeys(keys, self._deadline()))

    async def _run(self, script: bytes, calls: Sequence[tuple[str, Sequence[bytes | str | int]]]) -> list[str]:
        """Calls a script for some sessions, in one round trip."""
        async with self._asking():
            told = await self._pipelined(script, calls)
            missed = [place for place, one in enumerate(told) if isinstance(one, NoScriptError)]
            if missed:  # the store was restarted, or its scripts flushed: of these calls nothing was applied
                await self._redis.script_load(script)
                for place, one in zip(missed, await self._pipelined(script, [calls[p] for p in missed]), strict=True):
                    told[place] = one
            for one in told:
                if isinstance(one, Exception):
                    raise one
            return [one[0].decode() for one in told]

    async def _pipelined(self, script: bytes, calls: Sequence[tuple[str, Sequence[bytes | str | int]]]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for key, arguments in calls:
            pipeline.evalsha(self._scripts[script], 2, *_names(key), *arguments)
        if self._replicas:
            pipeline.execute_command("WAIT", self._replicas, self._timeout_ms)
        told: list[Any] = await pipeline.execute(raise_on_error=False)
        if self._replicas and not isinstance(told[-1], Exception) and told.pop() < self._replicas:
            raise TimeoutError(f"fewer than {self._replicas} replicas of the store have the write")
        return told[: len(calls)]

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        try:
            yield
            if self._away:
                self._away = False
                log.info("the store answers again")
        except (ConnectionError, TimeoutError, ResponseError, OSError) as error:
            if not self._away:  # once, not for each request
                self._away = True
                log.error("the store does not answer: %s", error)
            raise StoreAway(
                "the store of sessions does not answer: send the request again in a second (with its position, so "
                "that it is applied once)"
            ) from None


def new_revision() -> bytes:
    """Draws a revision: 128 random bits."""
    return secrets.token_bytes(16)


def _names(key: str) -> tuple[str, str]:
    return f"cellserve:{{{key}}}:session", f"cellserve:{{{key}}}:fate"


def _stored(values: Sequence[bytes]) -> Stored:
    model, version, digest, position, revision, states, origin, asked, asked_at, reached, y, before = values
    told = model.decode(), int(version), digest.decode(), int(position)
    return Stored(*told, revision, states, origin, asked, int(asked_at), int(reached), y, before)
