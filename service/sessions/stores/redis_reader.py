"""Reading the sessions in a Redis from outside, without extending their lives."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from cellserve.service.sessions.stores import redis_scripts as scripts
from cellserve.service.sessions.stores.protocol import StoreUnusable
from cellserve.service.sessions.stores.records import SessionRecord, TombstoneRecord, UnreadableRecord
from cellserve.service.sessions.stores.redis_connection import Command, RedisConnection, checked, is_wrong_type
from cellserve.service.sessions.stores.redis_faults import FAULTS, fault_of

_PAGE = 500  # sessions that are listed in one call

T = TypeVar("T")


class ListedKey(NamedTuple):
    """A session in a list."""

    key: str
    expires_in: float  # seconds
    summary: tuple[str, int, int, float] | UnreadableRecord  # model, version, position and creation


class RedisReader:
    """The sessions of all owners in a Redis. Every call raises StoreUnusable if it fails.

    Args:
        url: What `redis_url.connect` takes.
        timeout_seconds: Timeout of a call.

    Raises:
        StoreUnusable: The URL is invalid.
    """

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self._connection = RedisConnection(url, timeout_seconds)

    async def sessions(self) -> AsyncIterator[ListedKey]:
        """Iterates over the live sessions, each once: by their deadlines, which only ever move on."""
        seen: set[str] = set()
        start, offset = -math.inf, 0  # a deadline, and how many sessions of just that one to pass over
        while True:
            listing = "ZRANGEBYSCORE", scripts.INDEX, repr(start), "+inf", "WITHSCORES", "LIMIT", offset, _PAGE
            page = await self._call([listing], _read_page)
            new = [key for key, _ in page if key not in seen]
            seen.update(new)
            for one in await self._look_at(new):
                yield one
            if len(page) < _PAGE:
                return
            last = page[-1][1]
            same = sum(deadline == last for _, deadline in page)
            start, offset = last, offset + same if last == start else same

    async def find(self, key: str) -> tuple[SessionRecord | TombstoneRecord | None, float]:
        """Reads a session, and the seconds until it expires, or its tombstone; raises UnreadableRecord."""
        session, tombstone = scripts.names(key)
        commands = [("HMGET", session, *SessionRecord.FIELDS), ("GET", tombstone), ("PTTL", session)]

        def read(replies: list[Any]) -> tuple[list[bytes | None] | None, bytes | None, float]:
            values, ended = (None if is_wrong_type(one) else checked(one) for one in replies[:2])
            return values, ended, checked(replies[2]) / 1000

        values, ended, left = await self._call(commands, read)
        if values is None:
            raise UnreadableRecord("it is not a hash")
        if any(value is not None for value in values):
            return SessionRecord.read(values), left
        return None if ended is None else TombstoneRecord.read(ended), 0.0

    async def close(self) -> None:
        """Closes the connections."""
        await self._connection.close()

    async def _look_at(self, keys: list[str]) -> list[ListedKey]:
        """Returns those of these sessions that live."""
        names = [scripts.names(key)[0] for key in keys]
        commands: list[Command] = [("HMGET", name, *SessionRecord.SUMMARY) for name in names]
        commands += [("PTTL", name) for name in names]

        def read(replies: list[Any]) -> list[ListedKey]:
            found = []
            for key, values, left in zip(keys, replies[: len(keys)], replies[len(keys) :], strict=True):
                summary: tuple[str, int, int, float] | UnreadableRecord
                try:
                    if is_wrong_type(values):
                        raise UnreadableRecord("it is not a hash")
                    if not any(checked(values)):
                        continue  # it has expired
                    summary = SessionRecord.read_summary(values)
                except UnreadableRecord as error:
                    summary = error
                found.append(ListedKey(key, checked(left) / 1000, summary))
            return found

        return await self._call(commands, read) if commands else []

    async def _call(self, commands: Sequence[Command], read: Callable[[list[Any]], T]) -> T:
        try:
            return (await self._connection.attempt(commands, read))[1]
        except FAULTS as error:
            raise StoreUnusable(f"--store: {fault_of(error).told}") from None


def _read_page(replies: list[Any]) -> list[tuple[str, float]]:
    """Returns sessions and their deadlines, which come in pairs or not, by the version of the protocol."""
    reply = checked(replies[0])
    pairs = reply if reply and not isinstance(reply[0], bytes) else zip(reply[::2], reply[1::2], strict=True)
    return [(key.decode(errors="replace"), float(deadline)) for key, deadline in pairs]  # no such session is found
