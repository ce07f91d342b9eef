"""What changes a session: steps, and states that are set; once each where the request says where it starts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.arena import Slots
from service.engine import Engine
from service.errors import Problem, ServerFull, Stale, StepInFlight
from service.exactly_once import Applied, Request, check
from service.sessions import Session, SessionTable
from service.ticks import Advance, Told

Array = NDArray[Any]

_LARGE_ANSWER = 4096  # bytes of y: beyond them (and the states' own size) the states before a step are kept instead
_is_alive = attrgetter("alive")


class Stepped(NamedTuple):
    """What came of a step."""

    y: Array  # [time, *outputs], time is 1 where the last output was wanted
    position: int  # after it
    replayed: bool = False  # it had been applied before


class SteppedMany(NamedTuple):
    """What came of a step of several sessions, by row."""

    y: Array  # [sessions, time, *outputs]
    positions: Array  # [sessions], after it
    problems: dict[int, Problem]  # why a session has not moved
    replayed: set[int]  # it had been applied before


class Changes:
    """Changes the sessions of a table, each in its turn.

    Args:
        table: Holds them.
    """

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self.replays = 0  # repetitions that were told their answer again, so far

    def begin(
        self, session: Session, x: Array, every_output: bool, done: Told | None = None, request: Request | None = None
    ) -> Advance | None:
        """Queues a step of a session at once, or gives None where it cannot be: then `step` waits for its turn.

        Args:
            session: The session.
            x: `[time, *features]`, checked.
            every_output: Whether the outputs of all time steps are wanted, or the last one's.
            done: What to tell the end, where nobody awaits it.
            request: Where it is to start from.

        Raises:
            SessionGone: It has ended since it was looked up; its slot may be another's by now.
            StepInFlight: Another change with a position is under way.
            PositionConflict, SessionWentBack: It does not start where the session is.
            QueueFull: Too much is waiting.
        """
        if not session.alive:
            raise self._table.missing(session.owner, session.id)
        if session.engine.arena.held[session.slot]:
            if request is not None and session.claimed:
                raise _in_flight(session)
            return None
        if self._table.shared:
            if not self._table.is_current(session, request):
                return None
        elif request is not None and check(session.position, session.applied, request) is not None:
            return None
        session.engine.arena.held[session.slot] = True
        return self._submit(session, x, every_output, request, done)

    def begin_many(self, sessions: Sequence[Session], slots: Slots, x: Array, done: Told) -> Advance | None:
        """Queues a step of different live sessions at once; gives None where they are held or too many for one run.

        Args:
            sessions: The sessions, of one model.
            slots: Their slots.
            x: `[sessions, time, *features]`, checked.
            done: What to tell the end.

        Raises:
            QueueFull: Too much is waiting.
        """
        engine = sessions[0].engine
        if len(slots) > engine.max_batch or not self._table.turns[engine].try_enter(slots):
            return None
        if self._table.shared and not all(self._table.is_current(session, None) for session in sessions):
            self._table.turns[engine].leave(slots)
            return None
        return self._queue(engine, slots, x, True, done)

    async def step(self, session: Session, x: Array, every_output: bool, request: Request | None = None) -> Stepped:
        """Steps a session when those before it have had their turn; all time steps are one unit.

        Args:
            session: The session.
            x: `[time, *features]`, checked.
            every_output: Whether the outputs of all time steps are wanted, or the last one's.
            request: Where it is to start from; then it is applied once, however often it is sent.

        Raises:
            SessionGone: It was deleted meanwhile.
            StepInFlight: Another change with a position is under way.
            PositionConflict, SessionWentBack: It does not start where the session is.
            NotFinite: The outputs or the next state would not be finite.
        """
        while True:
            try:
                return await self._step(session, x, every_output, request)
            except Stale:
                session = await self._table.find(session.owner, session.id)

    async def _step(self, session: Session, x: Array, every_output: bool, request: Request | None) -> Stepped:
        advance = self.begin(session, x, every_output, None, request)
        if advance is None:
            async with self.turn(session, request) as again:
                if again is not None:
                    return await self._replayed(session, again, x, every_output)
                advance = self._submit(session, x, every_output, request)
        y = await advance.awaited
        return Stepped(y[0], advance.reached[0])

    async def step_many(
        self, sessions: Sequence[Session], slots: Slots, x: Array, requests: Sequence[Request] | None = None
    ) -> SteppedMany:
        """Steps different sessions of one model by as many time steps each, when those before have had their turn.

        Args:
            sessions: The sessions.
            slots: Their slots.
            x: `[sessions, time, *features]`, checked.
            requests: Where each is to start from; then each is applied once, however often it is sent.
        """
        engine = sessions[0].engine
        y = engine.model.outputs.zeros(*x.shape[:2])
        stepped = SteppedMany(y, np.zeros(len(sessions), np.int64), {}, set())
        rows: Sequence[int] = range(len(sessions))
        claimed: Sequence[int] = ()
        if requests is not None:
            rows = claimed = [row for row in rows if not sessions[row].claimed]
            stepped.problems.update(
                {row: _in_flight(session) for row, session in enumerate(sessions) if session.claimed}
            )
            for row in rows:
                sessions[row].claimed = True
        try:
            rows = self._living(sessions, rows, stepped)
            if len(rows) == len(sessions):
                await self._table.turns[engine].enter(sessions, slots)
            elif rows:
                await self._table.turns[engine].enter([sessions[row] for row in rows], slots[rows])
            rows = self._living(sessions, rows, stepped)
        finally:
            for row in claimed:  # those that have ended too: a socket asks for them again
                sessions[row].claimed = False
        if self._table.shared:
            rows = await self._followed(sessions, requests, rows, stepped)
        if requests is not None:
            rows = await self._checked(sessions, requests, rows, x, stepped)
        parts = [rows[start : start + engine.max_batch] for start in range(0, len(rows), engine.max_batch)]
        under_way: list[tuple[Any, Advance]] = []
        for part in parts:
            own: Any = slice(part.start, part.stop) if isinstance(part, range) else part
            try:
                if requests is None:
                    advance = self._queue(engine, slots[own], x[own], True)
                else:
                    asked = [sessions[row] for row in part], [requests[row] for row in part]
                    advance = self._queue_once(engine, *asked, slots[own], x[own], True)
                under_way.append((own, advance))
            except Problem as problem:
                stepped.problems.update(dict.fromkeys(part, problem))
        for own, advance in under_way:
            part = range(len(sessions))[own] if isinstance(own, slice) else own
            try:
                y[own] = await advance.awaited
            except Problem as problem:
                stepped.problems[part[0]] = problem
            stepped.problems.update({part[row]: problem for row, problem in (advance.problems or {}).items()})
            stepped.positions[own] = advance.reached
        await self.again(sessions, x, requests, stepped)
        return stepped

    async def again(
        self, sessions: Sequence[Session], x: Array, requests: Sequence[Request] | None, stepped: SteppedMany
    ) -> None:
        """Steps those once more whose slots held what had been changed elsewhere, of some that were stepped together.

        Args:
            sessions: All of them.
            x: `[sessions, time, *features]`.
            requests: Where each is to start from.
            stepped: What has come of it, and is mended.
        """
        for row in [row for row, problem in stepped.problems.items() if isinstance(problem, Stale)]:
            del stepped.problems[row]
            try:
                alone = await self.step(sessions[row], x[row], True, None if requests is None else requests[row])
            except Problem as problem:
                stepped.problems[row] = problem
                continue
            stepped.y[row], stepped.positions[row] = alone.y, alone.position
            if alone.replayed:
                stepped.replayed.add(row)

    async def step_versions(
        self, sessions: Sequence[Session], slots: Slots, x: Array, requests: Sequence[Request] | None = None
    ) -> SteppedMany:
        """Steps sessions of several versions, whose inputs and outputs are alike, as `step_many` those of one."""
        rows_of: dict[Engine, list[int]] = {}
        for row, session in enumerate(sessions):
            rows_of.setdefault(session.engine, []).append(row)
        parts = list(rows_of.values())
        asked = [None if requests is None else [requests[row] for row in rows] for rows in parts]
        done = await asyncio.gather(
            *(
                self.step_many([sessions[row] for row in rows], slots[rows], x[rows], own)
                for rows, own in zip(parts, asked, strict=True)
            )
        )
        y = np.zeros((len(sessions), *done[0].y.shape[1:]), done[0].y.dtype)
        whole = SteppedMany(y, np.zeros(len(sessions), np.int64), {}, set())
        for rows, part in zip(parts, done, strict=True):
            whole.y[rows], whole.positions[rows] = part.y, part.positions
            whole.problems.update({rows[row]: problem for row, problem in part.problems.items()})
            whole.replayed.update(rows[row] for row in part.replayed)
        return whole

    async def _followed(
        self, sessions: Sequence[Session], requests: Sequence[Request] | None, rows: Sequence[int], stepped: SteppedMany
    ) -> Sequence[int]:
        """Gives the rows whose sessions are as they stand elsewhere, of those held; lets go of the others."""
        sound = []
        for row in rows:
            session = sessions[row]
            try:
                await self._table.follow(session, None if requests is None else requests[row])
                sound.append(row)
            except Problem as problem:
                stepped.problems[row] = problem
                if session.alive:
                    self._table.turns[session.engine].leave(session.slots)
        return sound

    def _living(self, sessions: Sequence[Session], rows: Sequence[int], stepped: SteppedMany) -> Sequence[int]:
        """Gives the rows whose sessions are alive, and notes that the others are gone."""
        if all(map(_is_alive, sessions)):
            return rows
        ended = [row for row in rows if not sessions[row].alive]
        stepped.problems.update({row: self._table.missing(sessions[row].owner, sessions[row].id) for row in ended})
        return [row for row in rows if sessions[row].alive]

    async def _checked(
        self,
        sessions: Sequence[Session],
        requests: Sequence[Request],
        rows: Sequence[int],
        x: Array,
        stepped: SteppedMany,
    ) -> Sequence[int]:
        """Gives the rows that are to be applied, of those held; answers the others and lets go of them."""
        to_apply, again = [], []
        for row in rows:
            session = sessions[row]
            try:
                last = check(session.position, session.applied, requests[row])
            except Problem as problem:
                stepped.problems[row] = problem
                stepped.positions[row] = session.position
                self._table.turns[session.engine].leave(session.slots)
                continue
            if last is None:
                to_apply.append(row)
            else:
                again.append((row, last))
                self.replays += 1
                self._table.touch(session)
                self._table.turns[session.engine].leave(session.slots)
        for row, last in again:
            try:
                told = await self._replayed(sessions[row], last, x[row], True)
            except Problem as problem:
                stepped.problems[row] = problem
                continue
            stepped.y[row], stepped.positions[row] = told.y, told.position
            stepped.replayed.add(row)
        return to_apply

    async def set_state(
        self, session: Session, states: dict[str, Array] | None, request: Request | None = None
    ) -> tuple[int, bool]:
        """Sets a session's state, to zeros where it is None, in its turn.

        Returns:
            The position after it, and whether it had been applied before.

        Raises:
            SessionGone, StepInFlight, PositionConflict, SessionWentBack: As `step` does.
        """
        while True:
            try:
                async with self.turn(session, request) as again:
                    if again is not None:
                        return again.reached, True
                    try:
                        await self._table.put_states(session, states, request)
                        self._table.touch(session)
                        return session.position, False
                    finally:
                        self._table.turns[session.engine].leave(session.slots)
            except Stale:
                session = await self._table.find(session.owner, session.id)

    @asynccontextmanager
    async def turn(
        self, session: Session, request: Request | None, waits: bool = False
    ) -> AsyncIterator[Applied | None]:
        """Waits for a turn to change the session; gives what to answer again where the request is a repetition.

        Where it is none, whoever gets the turn hands it on when the change is done.

        Args:
            session: The session.
            request: The change, where it has a position.
            waits: Whether it waits for another change with a position, too, that is under way.
        """
        if not session.alive:
            raise self._table.missing(session.owner, session.id)
        claims = request is not None and not waits
        if claims:
            if session.claimed:
                raise _in_flight(session)
            session.claimed = True
        try:
            await self._table.turns[session.engine].enter((session,), session.slots)
            if not session.alive:
                raise self._table.missing(session.owner, session.id)
        finally:
            session.claimed = session.claimed and not claims
        try:
            if self._table.shared:
                await self._table.follow(session, request)
            again = None if request is None else check(session.position, session.applied, request)
        except BaseException:
            if session.alive:
                self._table.turns[session.engine].leave(session.slots)
            raise
        if again is not None:
            self.replays += 1
            self._table.touch(session)
            self._table.turns[session.engine].leave(session.slots)
        yield again

    def _submit(
        self, session: Session, x: Array, every_output: bool, request: Request | None, done: Told | None = None
    ) -> Advance:
        """Queues a step of one session that is held, and notes with it what its repetition will be told."""
        if request is None:
            return self._queue(session.engine, session.slots, x[None], every_output, done)
        return self._queue_once(session.engine, [session], [request], session.slots, x[None], every_output, done)

    def submit_part(self, session: Session, x: Array, request: Request, before: dict[str, Array]) -> Advance:
        """Queues a step of a session that is held, which is a part of a larger change.

        Args:
            session: The session.
            x: `[time, *features]`.
            request: The larger change.
            before: The states before that, from which its repetition is computed as far as it has come.
        """
        return self._queue_once(session.engine, [session], [request], session.slots, x[None], False, before=[before])

    def _queue_once(
        self,
        engine: Engine,
        sessions: Sequence[Session],
        requests: Sequence[Request],
        slots: Slots,
        x: Array,
        every_output: bool,
        done: Told | None = None,
        before: Sequence[dict[str, Array] | None] | None = None,
    ) -> Advance:
        arena = engine.arena
        size = engine.model.outputs.step_bytes * (x.shape[1] if every_output else 1)
        large = before is not None or size > max(_LARGE_ANSWER, arena.row_bytes)
        if before is None:
            before = [arena.read(session.slot) if large else None for session in sessions]
        advance = self._queue(engine, slots, x, every_output, done)
        for session in sessions:
            session.claimed = True

        def note(y: Array | None) -> None:
            for row, session in enumerate(sessions):
                session.claimed = False
                if y is not None and row not in (advance.problems or ()):
                    answer = None if large else y[row].copy()
                    session.applied = Applied(requests[row], session.position, answer, before[row])

        advance.note, advance.requests, advance.before = note, requests, before if large else None
        return advance

    async def _replayed(self, session: Session, again: Applied, x: Array, every_output: bool) -> Stepped:
        """Gives the answer of a step that has been applied before."""
        y = again.y
        if y is None:
            engine = session.engine
            slots = engine.arena.take_many(1)
            if slots is None:
                raise ServerFull("too many sequences are in flight: try again in a second")
            try:
                engine.arena.write(int(slots[0]), again.before)
                y = (await engine.submit(slots, x[None], every_output).awaited)[0]
            finally:
                engine.arena.give_back(slots)
        return Stepped(y, again.reached, True)

    def _queue(self, engine: Engine, slots: Slots, x: Array, every_output: bool, done: Told | None = None) -> Advance:
        """Queues a step of sessions that are held; they are left when it ends."""
        try:
            return engine.submit(slots, x, every_output, True, done)
        except Problem:
            self._table.turns[engine].leave(slots)
            raise


def _in_flight(session: Session) -> StepInFlight:
    return StepInFlight(
        "position: a change with a position is under way in the session: "
        "wait for its answer, or send the same again in a second",
        position=session.position,
    )
