"""Locks of sessions: what changes a session goes one by one, in order of arrival."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from cellserve.service.engine.state_arena import Arena, Slots


class Lockable(Protocol):
    """A session, as far as its lock is concerned."""

    slot: int
    slots: Slots
    alive: bool


@dataclass(slots=True)
class Lease:
    """A lock that is held for the length of a `with`, or longer where it is handed over."""

    handed_over: bool = False

    def hand_over(self) -> None:
        """Leaves the release to whoever completes the work that was just enqueued."""
        self.handed_over = True


@dataclass(slots=True, eq=False)
class _Waiter:
    ready: asyncio.Future[None]
    missing: int = 0  # locks that others still hold


class SessionLocks:
    """The locks of one arena's sessions: a column of the arena, so that a tick releases all of its sessions at once.

    Waiters are served first come, first served, over all of their sessions at once: whoever waits waits only for those
    who came before, so that there is no deadlock.

    Args:
        arena: Holds the column.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._queues: dict[int, deque[_Waiter]] = {}  # by slot, where two requests meet; most never do

    def is_locked(self, slot: int) -> bool:
        """Tells whether a session is locked."""
        return bool(self._arena.held[slot])

    def lock(self, slot: int) -> None:
        """Locks a session that is not locked."""
        self._arena.held[slot] = True

    def try_acquire(self, slots: Slots) -> bool:
        """Locks sessions if none of them is locked."""
        held = self._arena.held
        if held[slots].any():
            return False
        held[slots] = True
        return True

    async def acquire(self, sessions: Sequence[Lockable], slots: Slots) -> None:
        """Locks live sessions. Those that end while this waits are not locked."""
        if not len(slots) or self.try_acquire(slots):
            return
        held = self._arena.held
        waiter = _Waiter(asyncio.get_running_loop().create_future())
        for session in sessions:
            if held[session.slot]:
                self._queues.setdefault(session.slot, deque()).append(waiter)
                waiter.missing += 1
            else:
                held[session.slot] = True
        try:
            await waiter.ready
        except asyncio.CancelledError:
            for session in sessions:
                queue = self._queues.get(session.slot)
                if not session.alive:
                    continue  # the slot may be another's by now
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
            lease: Says at the end whether somebody else releases it.
        """
        await self.acquire((session,), session.slots)
        try:
            yield
        finally:
            if session.alive and not (lease is not None and lease.handed_over):
                self.release(session.slots)

    def release(self, slots: Slots) -> None:
        """Unlocks sessions, or hands them to whoever waits for them."""
        if not self._queues:
            self._arena.held[slots] = False
            return
        for slot in slots.tolist():
            self._release_one(slot)

    def discard(self, slot: int) -> None:
        """Drops the lock of a session that has ended; whoever waits for it finds that out."""
        self._arena.held[slot] = False
        for waiter in self._queues.pop(slot, ()):
            self._wake(waiter)

    def _release_one(self, slot: int) -> None:
        queue = self._queues.get(slot)
        if queue:
            self._wake(queue.popleft())
        else:
            self._queues.pop(slot, None)
            self._arena.held[slot] = False

    def _wake(self, waiter: _Waiter) -> None:
        waiter.missing -= 1
        if not waiter.missing and not waiter.ready.done():
            waiter.ready.set_result(None)
