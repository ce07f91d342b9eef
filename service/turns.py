"""Whose turn it is: what changes a session goes one by one, in order of arrival, without locks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from service.arena import Arena, Slots


class Held(Protocol):
    """What there are turns for."""

    slot: int
    alive: bool


@dataclass(slots=True, eq=False)
class _Waiter:
    ready: asyncio.Future[None]
    missing: int = 0  # that others hold still


class Turns:
    """The turns of one arena's sessions; who holds one is a column of the arena, so that a tick lets go of all at once.

    Args:
        arena: Holds the column.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._queues: dict[int, deque[_Waiter]] = {}  # by slot, where two requests meet; most never do

    def try_enter(self, slots: Slots) -> bool:
        """Holds sessions where nobody else holds any of them."""
        held = self._arena.held
        if held[slots].any():
            return False
        held[slots] = True
        return True

    async def enter(self, sessions: Sequence[Held], slots: Slots) -> None:
        """Holds live sessions; waits for those who came before, all of whom are known from the start.

        So who waits always waits for those who came before, never in a circle. Those that have ended meanwhile are not
        held.
        """
        if not len(slots) or self.try_enter(slots):
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
                    self._leave_one(session.slot)
            raise

    def leave(self, slots: Slots) -> None:
        """Hands sessions to whoever waits for them."""
        if not self._queues:
            self._arena.held[slots] = False
            return
        for slot in slots.tolist():
            self._leave_one(slot)

    def end(self, slot: int) -> None:
        """Lets go of a session that has ended; who waits for it finds that out."""
        self._arena.held[slot] = False
        for waiter in self._queues.pop(slot, ()):
            self._hand(waiter)

    def _leave_one(self, slot: int) -> None:
        queue = self._queues.get(slot)
        if queue:
            self._hand(queue.popleft())
        else:
            self._queues.pop(slot, None)
            self._arena.held[slot] = False

    def _hand(self, waiter: _Waiter) -> None:
        waiter.missing -= 1
        if not waiter.missing and not waiter.ready.done():
            waiter.ready.set_result(None)
