"""Rollouts: autoregressive generation, in which a session's output becomes its next input.

A rollout is either one unit, applied completely or not at all, or a stream that applies and returns step by step.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellserve.service.errors import PositionConflict
from cellserve.service.idempotency import IdempotencyKey, hashed, rollout_key
from cellserve.service.model_repository.model import Model
from cellserve.service.sessions.sampling import Sampling, sample
from cellserve.service.sessions.session import Session
from cellserve.service.sessions.writer import SessionWriter

Array = NDArray[Any]
States = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Rollout:
    """A rollout of a session: feed x, then feed each output back as the next input."""

    x: Array  # [time, *features]
    steps: int  # outputs to generate; the last one is not fed back
    sampling: Sampling | None  # None if the output itself is the next input
    streamed: bool

    @property
    def moves(self) -> int:
        """Time steps by which it advances the session."""
        return len(self.x) + self.steps - 1

    async def key(self, position: int) -> IdempotencyKey:
        """Returns the idempotency key of this rollout at a position."""
        options = f"{len(self.x)} {self.steps} {self.streamed} {self.sampling and tuple(self.sampling)}"
        return await hashed(self.x, partial(rollout_key, position, self.x, options.encode()))


class GeneratedStep(NamedTuple):
    """One generated output, as the next input."""

    position: int  # the session's position after the step that generated it
    x: Array  # [*features]: the sampled symbol, or the output itself


class RolloutResult(NamedTuple):
    """The result of a rollout as one unit."""

    generated: list[GeneratedStep]
    position: int  # after the rollout
    replayed: bool  # whether it had been applied before


class RolloutRunner:
    """Runs rollouts.

    Args:
        writer: Changes the sessions.
    """

    def __init__(self, writer: SessionWriter) -> None:
        self._writer = writer
        # By request, the stream that was started last; it is the only one that may continue.
        self._newest: dict[tuple[str, str, bytes], object] = {}

    async def run(self, session: Session, wanted: Rollout, position: int | None) -> RolloutResult:
        """Runs a rollout as one unit, after the changes that came before: it is applied completely or not at all.

        Args:
            session: The session.
            wanted: The rollout.
            position: Its starting position; with one, the rollout is applied once, however often it is sent.

        Raises:
            SessionGone, StepInFlight, PositionConflict, SessionWentBack, NotFinite: As `SessionWriter.submit` does.
            ModelFailed: No symbol can be sampled from an output.
        """
        key = None if position is None else await wanted.key(position)

        async def attempt(session: Session) -> RolloutResult:
            async with self._writer.locked(session, key) as change:
                if change.applied is None:
                    before = session.engine.arena.read(session.slot)
                    generated, states = await _generate(session, before, wanted, session.position, wanted.steps)
                    await self._writer.write_state(session, states, key, wanted.moves, before)
                    return RolloutResult(generated, session.position, False)
            applied = change.applied
            generated, _ = await _generate(session, applied.states_before, wanted, applied.key.position, wanted.steps)
            return RolloutResult(generated, applied.position_after, True)

        return await self._writer.retrying(session, attempt)

    async def stream(
        self, session: Session, wanted: Rollout, position: int | None, after: int | None
    ) -> AsyncGenerator[GeneratedStep, None]:
        """Runs a rollout step by step; each output is yielded once the step that generated it is committed.

        No lock is held between two steps. Another change of the session ends the stream, and so does a newer stream of
        the same request, which continues in its place.

        Args:
            session: The session.
            wanted: The rollout.
            position: Its starting position. If part of this rollout is applied already, that part is computed again
                from the states before it, and the rest is applied.
            after: Outputs at positions up to this one are not yielded: the client has them.

        Raises:
            SessionGone, PositionConflict, SessionWentBack, NotFinite: As `SessionWriter.submit` does.
            ModelFailed: No symbol can be sampled from an output.
        """
        mine = object()
        request = None if position is None else _request_of(session, await wanted.key(position))
        if request is not None:
            self._newest[request] = mine
        try:
            key, before, generated = await self._start(session, wanted, position)
            if request is None:
                self._newest[request := _request_of(session, key)] = mine
            for one in generated:
                if after is None or one.position > after:
                    yield one
            last = generated[-1]
            end = key.position + wanted.moves
            while last.position < end:
                if self._newest.get(request) is not mine:
                    raise PositionConflict(
                        "Last-Event-ID: the stream was requested again and continues there: read the newer one",
                        position=session.position,
                    )
                session, last = await self._commit_one(session, wanted, key, before, last)
                if after is None or last.position > after:
                    yield last
        finally:
            if request is not None and self._newest.get(request) is mine:
                del self._newest[request]

    async def _start(
        self, session: Session, wanted: Rollout, position: int | None
    ) -> tuple[IdempotencyKey, States, list[GeneratedStep]]:
        """Feeds x, unless it was applied before; returns the key, the states before, and the outputs so far."""
        asked = None if position is None else await wanted.key(position)

        async def attempt(session: Session) -> tuple[IdempotencyKey, States, list[GeneratedStep]]:
            async with self._writer.locked(session, asked, waits=True) as change:
                if change.applied is None:
                    key = await wanted.key(session.position)
                    before = session.engine.arena.read(session.slot)
                    item = self._writer.enqueue_part(session, change, wanted.x, key, before)
            if change.applied is not None:
                assert change.applied.states_before is not None
                start = change.applied.key.position
                steps = change.applied.position_after - start - len(wanted.x) + 1
                generated, _ = await _generate(session, change.applied.states_before, wanted, start, steps)
                return change.applied.key, change.applied.states_before, generated
            y = (await item.awaited)[0, -1]
            return key, before, [_choose_next(session.model, wanted, y, key.position + len(wanted.x))]

        return await self._writer.retrying(session, attempt)

    async def _commit_one(
        self, session: Session, wanted: Rollout, key: IdempotencyKey, before: States, last: GeneratedStep
    ) -> tuple[Session, GeneratedStep]:
        """Feeds the last output back and commits that step; returns the session, looked up again, and the next one."""

        async def attempt(session: Session) -> tuple[Session, GeneratedStep]:
            async with self._writer.locked(session, IdempotencyKey(last.position, b""), waits=True) as change:
                if session.applied is None or session.applied.key != key:
                    raise PositionConflict(
                        "position: the session has been changed by others than this rollout: continue from its "
                        "current position",
                        position=session.position,
                    )
                item = self._writer.enqueue_part(session, change, last.x[None], key, before)
            y = (await item.awaited)[0, -1]
            return session, _choose_next(session.model, wanted, y, last.position + 1)

        return await self._writer.retrying(session, attempt)


async def _generate(
    session: Session, before: States | None, wanted: Rollout, start: int, steps: int
) -> tuple[list[GeneratedStep], States]:
    """Runs `steps` of a session's rollout on a copy of states; returns its outputs, and the states after them."""
    engine = session.engine
    with engine.scratch([before]) as slots:
        x, position, generated = wanted.x, start, list[GeneratedStep]()
        while len(generated) < steps:
            y = (await engine.submit(slots, x[None], False, client=session.client).awaited)[0, -1]
            position += len(x)
            generated.append(_choose_next(engine.model, wanted, y, position))
            x = generated[-1].x[None]
        return generated, engine.arena.read(int(slots[0]))


def _choose_next(model: Model, wanted: Rollout, y: Array, position: int) -> GeneratedStep:
    """Turns an output into the next input."""
    if wanted.sampling is None:
        return GeneratedStep(position, y.copy())
    spec = model.runtime.signature.inputs[0]
    assert spec.bounds is not None
    index = sample(y, model.document.rollout == "logits", wanted.sampling, position)
    return GeneratedStep(position, np.array(spec.bounds[0] + index, spec.dtype))


def _request_of(session: Session, key: IdempotencyKey) -> tuple[str, str, bytes]:
    return session.owner, session.id, key.digest
