"""Calls to Redis: commands sent together, their replies checked, and what goes wrong as a fault of the store."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import hiredis
from redis.exceptions import NoScriptError, ResponseError

from cellserve.service.errors import StoreUnavailable
from cellserve.service.sessions.stores.redis_faults import FAULTS, KINDS, BadReply, Fault, fault_of
from cellserve.service.sessions.stores.redis_scripts import SHA1
from cellserve.service.sessions.stores.redis_url import connect

_CONNECTIONS = 64  # further calls wait for one of them: redis-py would refuse them
_LOG_SECONDS = 10.0  # a fault that comes and goes is logged once in so long

Command = tuple[Any, ...]  # name and arguments: bytes, strings and numbers
Exchange = Callable[[Sequence[Command]], Awaitable[list[Any]]]
T = TypeVar("T")

log = logging.getLogger("cellserve")


class RedisConnection:
    """A pool of connections to Redis.

    Args:
        url: What `--store` says.
        timeout_seconds: Timeout of a call.

    Raises:
        StoreUnusable: The URL is invalid.
    """

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self.redis: Any = connect(url, timeout_seconds)
        pool: Any = getattr(self.redis, "connection_pool", None)
        self.is_cluster = pool is None
        self.timeout = timeout_seconds
        self._free = asyncio.Semaphore(_CONNECTIONS if pool is None else min(_CONNECTIONS, pool.max_connections))
        self._idle: list[Any] = []  # of the pool's connections: to give one back, and take it, is a tenth of a call
        self.errors = dict.fromkeys((fault.reason for fault in KINDS), 0)  # calls that failed so far
        self._fault: Fault | None = None  # the one that the log has told last, unless it is over
        self._logged_at = dict.fromkeys(self.errors, -math.inf)

    async def close(self) -> None:
        """Closes the connections."""
        await self.redis.aclose()

    async def load_scripts(self) -> None:
        """Loads the scripts; raises one of FAULTS."""
        for script in SHA1:
            await self.redis.script_load(script)

    async def call(self, commands: Sequence[Command], read: Callable[[list[Any]], T]) -> T:
        """Sends commands together and returns what `read` makes of their replies; raises StoreUnavailable.

        Args:
            commands: The commands.
            read: Gets the reply of each: a value, or the error that Redis answered. It raises that error if nothing can
                be made of the replies without it, and any other if they do not fit the commands.
        """
        try:
            replies, result = await self.attempt(commands, read)
        except FAULTS as error:
            self._tell(fault_of(error))
            raise StoreUnavailable() from None
        refused = next((one for one in replies if isinstance(one, ResponseError) and not is_wrong_type(one)), None)
        if refused is not None:
            self._tell(fault_of(refused))
        elif self._fault is not None:
            self._fault = None
            log.info("the store answers again")
        return result

    async def attempt(self, commands: Sequence[Command], read: Callable[[list[Any]], T]) -> tuple[list[Any], T]:
        """Returns the replies, and what `call` returns; raises one of FAULTS."""
        async with self._connected() as exchange:
            replies = await exchange(commands)
            missed = [place for place, one in enumerate(replies) if isinstance(one, NoScriptError)]
            if missed:  # Redis was restarted, or its scripts flushed: none of these calls was applied
                if self.is_cluster:
                    await self.load_scripts()
                else:  # over this connection: as many calls as there are may do so at once
                    await exchange([("SCRIPT", "LOAD", script) for script in SHA1])
                if commands[-1][0] == "WAIT":
                    missed.append(len(commands) - 1)
                for place, one in zip(missed, await exchange([commands[place] for place in missed]), strict=True):
                    replies[place] = one
            try:
                return replies, read(replies)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise BadReply(f"{type(error).__name__}: {error}") from None

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Exchange]:
        """Yields what sends commands and returns their replies, over one connection that is dropped if it fails."""
        if self.is_cluster:
            try:
                yield self._exchange_by_slot
            except BadReply:
                await self.redis.aclose()  # it connects again when it is used
                raise
            return
        if self._free.locked():
            async with asyncio.timeout(self.timeout):
                await self._free.acquire()
        else:
            await self._free.acquire()
        pool = self.redis.connection_pool
        try:
            connection = self._idle.pop() if self._idle else await pool.get_connection()
        except BaseException:
            self._free.release()
            raise
        try:
            await pool.ensure_connection(connection)
            yield partial(self._exchange, connection)
        except ResponseError:
            raise  # an answer as any other
        except BaseException as error:
            # The next reply may be that of an earlier command. After a failover, the others lead to the old primary.
            for one in (connection, *self._idle) if isinstance(error, FAULTS) else (connection,):
                await one.disconnect(nowait=True)
            raise
        finally:
            self._idle.append(connection)
            self._free.release()

    async def _exchange(self, connection: Any, commands: Sequence[Command]) -> list[Any]:
        # As redis-py's pipeline, in a third of its time (4 µs per write instead of 13): packed by hiredis, one timeout:
        # with one of its own, redis-py makes a task of each write.
        packed, replies = b"".join([hiredis.pack_command(command) for command in commands]), []
        waits = any(command[0] == "WAIT" for command in commands[-1:])  # which takes its own time after the others
        async with asyncio.timeout(2 * self.timeout if waits else self.timeout):
            connection.socket_timeout = None
            try:
                await connection.send_packed_command(packed, check_health=False)
            finally:
                connection.socket_timeout = self.timeout
            for _ in commands:
                try:
                    replies.append(await connection.read_response(disable_decoding=True, timeout=math.inf))
                except ResponseError as error:
                    replies.append(error)
        return replies

    async def _exchange_by_slot(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self.redis.pipeline()
        for command in commands:
            pipeline.execute_command(*command)
        return list(await pipeline.execute(raise_on_error=False))

    def _tell(self, fault: Fault) -> None:
        """Counts a fault, and logs it unless it was logged just now."""
        self.errors[fault.reason] += 1
        now = time.monotonic()
        if (self._fault is None or self._fault.reason != fault.reason) and (
            self._logged_at[fault.reason] < now - _LOG_SECONDS
        ):
            self._fault, self._logged_at[fault.reason] = fault, now
            log.error("the store fails (%s): %s", fault.reason, fault.told)


def is_wrong_type(reply: Any) -> bool:
    """Returns whether a reply says that the key holds another type of value: the record's fault, not the store's."""
    return isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE")


def checked(reply: T) -> T:
    """Returns a reply; raises it if it is an error."""
    if isinstance(reply, Exception):
        raise reply
    return reply
