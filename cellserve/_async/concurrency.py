"""Sleeping and locking among the tasks of an event loop; `cellserve._sync.concurrency` has the same for threads."""

from __future__ import annotations

import asyncio
from asyncio import Lock as AsyncLock
from asyncio import sleep
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cellserve.protocol.session import SessionRecord

__all__ = ["AsyncLock", "AsyncSessionLocks", "sleep"]


class AsyncSessionLocks:
    """Locks that give each session one request at a time: a position can only be sent once it is known.

    A group of sessions is locked all at once or not at all, so that two groups cannot block each other.
    """

    def __init__(self) -> None:
        self._released = asyncio.Event()

    @asynccontextmanager
    async def hold(self, sessions: Sequence[SessionRecord]) -> AsyncIterator[None]:
        """Waits until all of the sessions are free, and locks them."""
        while any(session.locked for session in sessions):
            await self._released.wait()
        for session in sessions:
            session.locked = True
        try:
            yield
        finally:
            for session in sessions:
                session.locked = False
            self._released.set()
            self._released = asyncio.Event()
