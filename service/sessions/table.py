"""The sessions that have a slot in this process, their locks, and which are idle. Shared stores expire sessions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.state_arena import Slots
from cellserve.service.sessions.locks import SessionLocks
from cellserve.service.sessions.session import Session


@dataclass(slots=True)
class ClientSessions:
    """The sessions of one client that have slots here."""

    number: int  # of the client, in the arenas' columns
    count: int = 0
    state_bytes: int = 0


class SessionTable:
    """All sessions that have a slot here, by owner and id, by engine and slot, and by owner in the order of adding.

    Args:
        idle_seconds: A session that is not used for this long counts as idle.
        clock: Returns seconds.
    """

    def __init__(self, idle_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.idle_seconds = idle_seconds
        self.clock = clock
        self.live: dict[str, Session] = {}  # by `key_of`
        self.by_slot: dict[Engine, dict[int, Session]] = {}
        self.locks: dict[Engine, SessionLocks] = {}
        self.of_owner: dict[str, dict[int, Session]] = {}  # by number, in ascending order
        self.ended_count = 0  # sessions that have left the table so far
        self.by_client: dict[str, ClientSessions] = {}  # clients without sessions are not in it
        self._clients = itertools.count(1)
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self.live)

    def register(self, engine: Engine) -> None:
        """Adds an engine, whose sessions can be added then."""
        self.by_slot[engine] = {}
        self.locks[engine] = SessionLocks(engine.arena)

    def unregister(self, engine: Engine) -> None:
        """Removes an engine that has no sessions."""
        del self.by_slot[engine], self.locks[engine]

    def add(self, session: Session) -> Session:
        """Adds a session whose slot has been filled."""
        self.live[session.key] = self.by_slot[session.engine][session.slot] = session
        arena, own = session.engine.arena, self.by_client.get(session.client)
        if own is None:
            own = self.by_client[session.client] = ClientSessions(next(self._clients))
        own.count += 1
        own.state_bytes += arena.row_bytes
        arena.client[session.slot] = own.number
        session.number = next(self._numbers)
        self.of_owner.setdefault(session.owner, {})[session.number] = session
        return session

    def remove(self, session: Session) -> None:
        """Removes a session and frees its slot; those that wait for its lock are woken and find it ended."""
        arena, slot = session.engine.arena, session.slot
        session.alive = False
        self.ended_count += 1
        del self.live[session.key], self.by_slot[session.engine][slot]
        arena.last_used[slot], arena.client[slot] = np.inf, 0
        own = self.by_client[session.client]
        own.count -= 1
        own.state_bytes -= arena.row_bytes
        if not own.count:
            del self.by_client[session.client]
        listed = self.of_owner[session.owner]
        del listed[session.number]
        if not listed:
            del self.of_owner[session.owner]
        self.locks[session.engine].discard(slot)
        arena.release(session.slots)

    def touch(self, session: Session) -> None:
        """Records that a session was used."""
        session.engine.arena.last_used[session.slot] = self.clock()

    def touch_slots(self, engine: Engine, slots: Slots) -> None:
        """Records that the sessions in slots were used."""
        engine.arena.last_used[slots] = self.clock()

    def idle(self) -> Iterator[Session]:
        """Yields the sessions that are idle and not locked."""
        now = self.clock()
        for engine, sessions in self.by_slot.items():
            arena = engine.arena
            for slot in np.flatnonzero((arena.last_used <= now - self.idle_seconds) & ~arena.locked).tolist():
                yield sessions[slot]

    def longest_idle(self, engine: Engine, client: ClientSessions | None = None) -> Session | None:
        """Returns the unlocked session of an engine, of one client or any, that was not used for the longest time."""
        arena = engine.arena
        left_out = arena.locked if client is None else arena.locked | (arena.client != client.number)
        idle = np.where(left_out, np.inf, arena.last_used)
        slot = int(np.argmin(idle))
        return self.by_slot[engine][slot] if np.isfinite(idle[slot]) else None
