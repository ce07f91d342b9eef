"""Locks of sessions: changes of a session run one at a time, in order of arrival."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from cellserve.service.engine.state_arena import Arena, Slots


class Lockable(Protocol):
    """The part of a session that its lock uses."""

    slot: int
    slots: Slots
    alive: bool


@dataclass(slots=True)
class Lease:
    """A lock that is held for the length of a `with` block, or longer if it is handed over."""

    handed_over: bool = False

    def hand_over(self) -> None:
        """Leaves the release to the session writer, which releases when the work just enqueued ends."""
        self.handed_over = True


@dataclass(slots=True, eq=False)
class _Waiter:
    ready: asyncio.Future[None]
    missing: int = 0  # locks that this waiter still needs


class SessionLocks:
    """The locks of one arena's sessions: a column of the arena, so that a tick releases all of its sessions at once.

    A waiter enters the queues of all its sessions at the same time and is served first in, first out. It only ever
    waits for those that came before it, so there is no deadlock.

    Args:
        arena: Holds the column.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._queues: dict[int, deque[_Waiter]] = {}  # by slot, only for slots that somebody waits for

    @property
    def contended(self) -> int:
        """Locks that were requested while they were held, and have not been free since."""
        return len(self._queues)

    def is_locked(self, slot: int) -> bool:
        """Returns whether a session is locked."""
        return bool(self._arena.locked[slot])

    def lock(self, slot: int) -> None:
        """Locks a session that is not locked."""
        self._arena.locked[slot] = True

    def try_acquire(self, slots: Slots) -> bool:
        """Locks sessions if none of them is locked."""
        locked = self._arena.locked
        if locked[slots].any():
            return False
        locked[slots] = True
        return True

    async def acquire(self, sessions: Sequence[Lockable], slots: Slots) -> None:
        """Locks live sessions, all or, if cancelled, none. Sessions that end meanwhile are not locked."""
        if not len(slots) or self.try_acquire(slots):
            return
        locked = self._arena.locked
        waiter = _Waiter(asyncio.get_running_loop().create_future())
        for session in sessions:
            if locked[session.slot]:
                self._queues.setdefault(session.slot, deque()).append(waiter)
                waiter.missing += 1
            else:
                locked[session.slot] = True
        try:
            await waiter.ready
        except asyncio.CancelledError:
            for session in sessions:
                queue = self._queues.get(session.slot)
                if not session.alive:
                    continue  # the slot may belong to another session by now
                if queue and waiter in queue:
                    queue.remove(waiter)
                else:
                    self._release_one(session.slot)
            raise

    @asynccontextmanager
    async def locked(self, session: Lockable, lease: Lease | None = None) -> AsyncIterator[None]:
        """Holds the lock of a live session, which may have ended by the time it is acquired (`session.alive`).

        Args:
            session: The session.
            lease: Tells at the end whether somebody else releases the lock.
        """
        await self.acquire((session,), session.slots)
        try:
            yield
        finally:
            if session.alive and not (lease is not None and lease.handed_over):
                self.release(session.slots)

    def release(self, slots: Slots) -> None:
        """Unlocks sessions, or passes their locks on to the next waiters."""
        if not self._queues:
            self._arena.locked[slots] = False
            return
        for slot in slots.tolist():
            self._release_one(slot)

    def discard(self, slot: int) -> None:
        """Drops the lock of a session that has ended, and wakes its waiters, which must check `session.alive`."""
        self._arena.locked[slot] = False
        for waiter in self._queues.pop(slot, ()):
            self._wake(waiter)

    def _release_one(self, slot: int) -> None:
        queue = self._queues.get(slot)
        if queue:
            self._wake(queue.popleft())
        else:
            self._queues.pop(slot, None)
            self._arena.locked[slot] = False

    def _wake(self, waiter: _Waiter) -> None:
        waiter.missing -= 1
        if not waiter.missing and not waiter.ready.done():
            waiter.ready.set_result(None)
