"""The table of the sessions that have a slot in this process, and of their locks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.state_arena import Slots
from cellserve.service.sessions.locks import SessionLocks
from cellserve.service.sessions.session import Session, key_of


class SessionTable:
    """All sessions that have a slot here, by owner and id, and by engine and slot.

    Args:
        idle_seconds: A session that is not used for so long is idle.
        clock: Returns seconds.
    """

    def __init__(self, idle_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.idle_seconds = idle_seconds
        self.clock = clock
        self.live: dict[str, Session] = {}  # by `key_of`
        self.by_slot: dict[Engine, dict[int, Session]] = {}
        self.locks: dict[Engine, SessionLocks] = {}
        self.numbers: dict[Engine, int] = {}  # in the order of by_slot; none is used twice
        self.endings = 0  # sessions that have left the table, so far
        self._engines = itertools.count()

    def __len__(self) -> int:
        return len(self.live)

    def register(self, engine: Engine) -> None:
        """Takes charge of an engine's sessions."""
        self.by_slot[engine] = {}
        self.locks[engine] = SessionLocks(engine.arena)
        self.numbers[engine] = next(self._engines)

    def unregister(self, engine: Engine) -> None:
        """Lets go of an engine that has no sessions."""
        del self.by_slot[engine], self.locks[engine], self.numbers[engine]

    def add(self, session: Session) -> Session:
        """Adds a session whose slot has been filled."""
        self.live[key_of(session.owner, session.id)] = self.by_slot[session.engine][session.slot] = session
        return session

    def remove(self, session: Session) -> None:
        """Removes a session and frees its slot; whoever waits for its lock finds that it has ended."""
        arena, slot = session.engine.arena, session.slot
        session.alive = False
        self.endings += 1
        del self.live[key_of(session.owner, session.id)], self.by_slot[session.engine][slot]
        arena.used[slot] = np.inf
        self.locks[session.engine].discard(slot)
        arena.give_back(session.slots)

    def touch(self, session: Session) -> None:
        """Counts as using a session, as stepping it does."""
        session.engine.arena.used[session.slot] = self.clock()

    def touch_slots(self, engine: Engine, slots: Slots) -> None:
        """Counts as using the sessions in some slots."""
        engine.arena.used[slots] = self.clock()

    def idle(self) -> Iterator[Session]:
        """Yields the sessions that have been idle for too long and are not locked."""
        now = self.clock()
        for engine, sessions in self.by_slot.items():
            arena = engine.arena
            for slot in np.flatnonzero((arena.used <= now - self.idle_seconds) & ~arena.held).tolist():
                yield sessions[slot]

    def longest_idle(self, engine: Engine) -> Session | None:
        """Returns the unlocked session of an engine that has not been used for the longest time."""
        arena = engine.arena
        idle = np.where(arena.held, np.inf, arena.used)
        slot = int(np.argmin(idle))
        return self.by_slot[engine][slot] if np.isfinite(idle[slot]) else None
