"""Sessions: a position and a state, held by the server under an id, bound to one version of one model."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arena import Slots
from service.engine import Engine
from service.errors import Problem, ServerFull, SessionGone, UnknownSession
from service.repository import Model
from service.ticks import Advance, Told

Array = NDArray[Any]

_SWEEP_SECONDS = 1.0
_is_alive = attrgetter("alive")


@dataclass(slots=True, eq=False)
class Session:
    """One session; its position and its state are in the slot. Its changes come one by one, in order of arrival."""

    id: str
    engine: Engine
    slot: int
    slots: Slots  # the slot again, as the engine takes it
    alive: bool = True

    @property
    def model(self) -> Model:
        """The version of the model that it began with and stays on."""
        return self.engine.model

    @property
    def position(self) -> int:
        """Counts what has changed it: its steps by their number, a reset by one."""
        return int(self.engine.arena.position[self.slot])


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is left of a session that is gone."""

    reason: str
    position: int
    until: float  # seconds of the table's clock


@dataclass(slots=True, eq=False)
class _Waiter:
    ready: asyncio.Future[None]
    missing: int = 0  # sessions that others hold still


class SessionTable:
    """All sessions of this process.

    Args:
        max_sessions: Live sessions, at most.
        idle_seconds: A session not used for so long expires.
        tombstone_seconds: For how long it is told of a session that it is gone.
        clock: Gives seconds.
    """

    def __init__(
        self,
        max_sessions: int,
        idle_seconds: float,
        tombstone_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_sessions = max_sessions
        self.idle_seconds = idle_seconds
        self._tombstone_seconds = tombstone_seconds
        self._clock = clock
        self._live: dict[str, Session] = {}
        self._by_slot: dict[Engine, dict[int, Session]] = {}
        self._gone: OrderedDict[str, Tombstone] = OrderedDict()  # the oldest first
        self.endings = 0  # of sessions, so far
        self._queues: dict[Session, deque[_Waiter]] = {}  # where two requests meet; most never do

    def __len__(self) -> int:
        return len(self._live)

    def create(self, engine: Engine, states: dict[str, Array] | None) -> Session:
        """Makes a session at position 0, from zeros or from given states.

        Raises:
            ServerFull: There are as many sessions as may be.
        """
        slot = engine.arena.take() if len(self._live) < self.max_sessions else None
        if slot is None:
            self.sweep()
            slot = engine.arena.take() if len(self._live) < self.max_sessions else None
        if slot is None:
            raise ServerFull(
                f"there are {len(self._live)} live sessions, as many as may be: delete some, or try again when one has "
                f"been idle for {self.idle_seconds:g} seconds"
            )
        arena = engine.arena
        if states is not None:
            arena.write(slot, states)
        arena.position[slot], arena.used[slot] = 0, self._clock()
        session = Session(secrets.token_hex(16), engine, slot, np.array((slot,)))
        self._live[session.id] = self._by_slot[engine][slot] = session
        return session

    def get(self, session_id: str) -> Session:
        """Gives a live session; one that has been idle for too long is live until the next sweep.

        Raises:
            UnknownSession: None of that id is known.
            SessionGone: It was deleted or has expired.
        """
        session = self._live.get(session_id)
        if session is None:
            raise self._missing(session_id)
        return session

    def touch(self, session: Session) -> None:
        """Counts as using a session, as stepping it does."""
        session.engine.arena.used[session.slot] = self._clock()

    def begin(self, session: Session, x: Array, every_output: bool, done: Told | None = None) -> Advance | None:
        """Queues a step of a session at once, or gives None where others came first: then `step` waits for them.

        Args:
            session: The session.
            x: `[time, *features]`, checked.
            every_output: Whether the outputs of all time steps are wanted, or the last one's.
            done: What to tell the end, where nobody awaits it.

        Raises:
            SessionGone: It has ended since it was looked up; its slot may be another's by now.
            QueueFull: Too much is waiting.
        """
        if not session.alive:
            raise self._missing(session.id)
        held = session.engine.arena.held
        if held[session.slot]:
            return None
        held[session.slot] = True
        return self._submit(session.engine, session.slots, x[None], every_output, done)

    def begin_many(self, engine: Engine, slots: Slots, x: Array, done: Told) -> Advance | None:
        """Queues a step of different live sessions at once; gives None where they are held or too many for one run.

        Args:
            engine: Of the sessions.
            slots: Their slots.
            x: `[sessions, time, *features]`, checked.
            done: What to tell the end.

        Raises:
            QueueFull: Too much is waiting.
        """
        held = engine.arena.held
        if len(slots) > engine.max_batch or held[slots].any():
            return None
        held[slots] = True
        return self._submit(engine, slots, x, True, done)

    async def step(self, session: Session, x: Array, every_output: bool) -> tuple[Array, int]:
        """Steps a session when those before it have had their turn.

        Args:
            session: The session.
            x: `[time, *features]`, checked.
            every_output: Whether the outputs of all time steps are wanted, or the last one's.

        Returns:
            `y [time, *outputs]` (time is 1 where the last output is wanted), and the position after it.

        Raises:
            SessionGone: It was deleted meanwhile.
            NotFinite: The outputs or the next state would not be finite.
        """
        advance = self.begin(session, x, every_output)
        if advance is None:
            await self._enter((session,), session.slots)
            if not session.alive:
                raise self._missing(session.id)
            advance = self._submit(session.engine, session.slots, x[None], every_output)
        y = await advance.awaited
        return y[0], advance.reached[0]

    async def step_many(
        self, sessions: Sequence[Session], slots: Slots, x: Array
    ) -> tuple[Array, Array, dict[int, Problem]]:
        """Steps different sessions of one model by as many time steps each, when those before have had their turn.

        Args:
            sessions: The sessions.
            slots: Their slots.
            x: `[sessions, time, *features]`, checked.

        Returns:
            `y [sessions, time, *outputs]`, the positions `[sessions]` after it, and by row why a session has not moved.
        """
        engine = sessions[0].engine
        live = range(len(sessions)) if all(map(_is_alive, sessions)) else _living(sessions)
        if len(live) == len(sessions):
            await self._enter(sessions, slots)
        else:
            await self._enter([sessions[row] for row in live], slots[live])
        problems: dict[int, Problem] = {}
        if not all(map(_is_alive, sessions)):
            live = _living(sessions)
            problems = {row: self._missing(session.id) for row, session in enumerate(sessions) if not session.alive}
        y = np.zeros((*x.shape[:2], *engine.model.output_shape), np.float32)
        positions = np.zeros(len(sessions), np.int64)
        parts = [live[start : start + engine.max_batch] for start in range(0, len(live), engine.max_batch)]
        under_way: list[tuple[Any, Advance]] = []
        for part in parts:
            rows: Any = slice(part.start, part.stop) if isinstance(part, range) else part
            try:
                under_way.append((rows, self._submit(engine, slots[rows], x[rows], True)))
            except Problem as problem:
                problems |= dict.fromkeys(part, problem)
        for rows, advance in under_way:
            part = range(len(sessions))[rows] if isinstance(rows, slice) else rows
            try:
                y[rows] = await advance.awaited
            except Problem as problem:
                problems[part[0]] = problem
            problems |= {part[row]: problem for row, problem in (advance.problems or {}).items()}
            positions[rows] = advance.reached
        return y, positions, problems

    @asynccontextmanager
    async def turn(self, session: Session) -> AsyncIterator[Session]:
        """Waits until the session is this request's alone, after those that came before it.

        Raises:
            SessionGone: It was deleted meanwhile.
        """
        await self._enter((session,), session.slots)
        if not session.alive:
            raise self._missing(session.id)
        try:
            yield session
        finally:
            if session.alive:
                self.touch(session)
                self._leave(session.engine, session.slots)

    async def delete(self, session_id: str) -> None:
        """Deletes a session when those before it have had their turn; a repeated call changes nothing.

        Raises:
            UnknownSession: None of that id is known.
            SessionGone: It had gone for another reason.
        """
        tombstone = self._gone.get(session_id)
        if tombstone is None or tombstone.reason != "deleted":
            async with self.turn(self.get(session_id)) as session:
                self._end(session, "deleted")

    def sweep(self) -> None:
        """Ends the sessions that have been idle for too long, and forgets old tombstones."""
        now = self._clock()
        for engine, sessions in self._by_slot.items():
            arena = engine.arena
            for slot in np.flatnonzero((arena.used <= now - self.idle_seconds) & ~arena.held).tolist():
                self._end(sessions[slot], "expired")
        while self._gone and next(iter(self._gone.values())).until <= now:
            self._gone.popitem(last=False)

    async def keep_swept(self) -> None:
        """Sweeps for as long as it runs."""
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self.idle_seconds))
            self.sweep()

    def serve(self, engine: Engine) -> None:
        """Takes charge of an engine's sessions."""
        self._by_slot[engine] = {}
        engine.settle = partial(self._settle, engine)
        engine.release = partial(self._leave, engine)

    def _submit(self, engine: Engine, slots: Slots, x: Array, every_output: bool, done: Told | None = None) -> Advance:
        """Queues a step of sessions that are held; they are left when it ends."""
        try:
            return engine.submit(slots, x, every_output, True, done)
        except Problem:
            self._leave(engine, slots)
            raise

    def _settle(self, engine: Engine, slots: Slots, steps: Array) -> Array:
        """Notes that sessions have moved by so many steps, and leaves them; gives their positions."""
        arena = engine.arena
        positions: Array = arena.position[slots] + steps
        arena.position[slots] = positions
        arena.used[slots] = self._clock()
        self._leave(engine, slots)
        return positions

    async def _enter(self, sessions: Sequence[Session], slots: Slots) -> None:
        """Holds live sessions of one engine; waits for those who came before, all of whom are known from the start.

        So who waits always waits for those who came before, never in a circle. Those that have been deleted meanwhile
        are not held.
        """
        if not len(slots):
            return
        held = sessions[0].engine.arena.held
        if not held[slots].any():
            held[slots] = True
            return
        waiter = _Waiter(asyncio.get_running_loop().create_future())
        for session in sessions:
            if held[session.slot]:
                self._queues.setdefault(session, deque()).append(waiter)
                waiter.missing += 1
            else:
                held[session.slot] = True
        try:
            await waiter.ready
        except asyncio.CancelledError:
            for session in sessions:
                queue = self._queues.get(session)
                if queue and waiter in queue:
                    queue.remove(waiter)
                elif session.alive:
                    self._leave(session.engine, session.slots)
            raise

    def _leave(self, engine: Engine, slots: Slots) -> None:
        """Hands sessions to whoever waits for them."""
        held = engine.arena.held
        if not self._queues:
            held[slots] = False
            return
        for slot in slots.tolist():
            queue = self._queues.get(self._by_slot[engine][slot])
            if queue:
                self._hand(queue.popleft())
            else:
                self._queues.pop(self._by_slot[engine][slot], None)
                held[slot] = False

    def _hand(self, waiter: _Waiter) -> None:
        waiter.missing -= 1
        if not waiter.missing and not waiter.ready.done():
            waiter.ready.set_result(None)

    def _end(self, session: Session, reason: str) -> None:
        """Ends a session that nobody else holds; who waits for it is told that it is gone."""
        arena, slot = session.engine.arena, session.slot
        session.alive = False
        self.endings += 1
        del self._live[session.id], self._by_slot[session.engine][slot]
        position = int(arena.position[slot])
        self._gone[session.id] = Tombstone(reason, position, self._clock() + self._tombstone_seconds)
        arena.used[slot], arena.held[slot] = np.inf, False
        arena.give_back(session.slots)
        for waiter in self._queues.pop(session, ()):
            self._hand(waiter)

    def _missing(self, session_id: str) -> UnknownSession | SessionGone:
        tombstone = self._gone.get(session_id)
        if tombstone is None:
            return UnknownSession("there is no session of that id: create one with POST /sessions")
        return SessionGone(
            f"the session was {tombstone.reason} at position {tombstone.position}: create another"
            if tombstone.reason == "deleted"
            else f"the session {tombstone.reason} at position {tombstone.position}: create another, use it more often",
            reason=tombstone.reason,
            position=tombstone.position,
        )


def _living(sessions: Sequence[Session]) -> list[int]:
    return [row for row, session in enumerate(sessions) if session.alive]
