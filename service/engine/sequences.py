"""Runs whole sequences through an engine, each in a slot borrowed for the call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.pending import Pending
from cellserve.service.engine.state_arena import Slots
from cellserve.service.errors import NotFinite

Array = NDArray[Any]


class SequenceResult(NamedTuple):
    """The result of one sequence."""

    y: Array  # [time, *outputs], time is 1 if only the last output was requested
    states: dict[str, Array] | None  # the final states, if requested


class PendingSequence(Pending):
    """One sequence under way in a slot of its own, which it gives back when it ends.

    Args:
        engine: The model's engine.
        slots: `[1]`, the slot.
        return_states: Whether to return the final states.
        on_done: Called with the result or the error, within the tick; it must not raise.
    """

    __slots__ = ("_engine", "_on_done", "_return_states", "_slots")

    def __init__(
        self,
        engine: Engine,
        slots: Slots,
        return_states: bool,
        on_done: Callable[[SequenceResult | Exception], None],
    ) -> None:
        super().__init__()
        self._engine, self._slots, self._return_states, self._on_done = engine, slots, return_states, on_done

    def cancel(self) -> None:
        """Drops what has not been computed; the callback is not called then."""
        if not self.done():
            super().cancel()
            self._engine.arena.give_back(self._slots)

    def set_result(self, y: Array) -> None:
        """Completes it."""
        self._state = 1
        arena = self._engine.arena
        states = arena.read(int(self._slots[0])) if self._return_states else None
        arena.give_back(self._slots)
        self._on_done(SequenceResult(y[0], states))

    def set_exception(self, error: BaseException) -> None:
        """Completes it with an error."""
        self._state = 1
        self._engine.arena.give_back(self._slots)
        if isinstance(error, Exception):
            self._on_done(error)


def start_sequence(
    engine: Engine,
    x: Array,
    every_output: bool,
    return_states: bool,
    on_done: Callable[[SequenceResult | Exception], None],
) -> PendingSequence:
    """Starts one sequence, from zeros, without anything that awaits it.

    Args:
        engine: The model's engine, of a model that can be stepped.
        x: `[time, *features]`, checked.
        every_output: Whether to return the outputs of all time steps.
        return_states: Whether to return the final states.
        on_done: Called with the result or the error, within the tick; it must not raise.

    Raises:
        QueueFull: Too much is waiting, or too many sequences are in flight.
    """
    slots = engine.borrow(1)
    pending = PendingSequence(engine, slots, return_states, on_done)
    try:
        pending.advance = engine.submit(slots, x[None], every_output, pending)
    except Exception:
        engine.arena.give_back(slots)
        raise
    return pending


def name_sequence(problem: NotFinite, place: str) -> NotFinite:
    """Returns a problem of one sequence as one of the request, which names the sequence."""
    return NotFinite(f"{place}: {problem.detail}", place=place, **problem.extensions)


async def run_sequences(
    engine: Engine,
    sequences: list[Array],
    states: list[dict[str, Array] | None] | None,
    every_output: bool,
    return_states: bool,
    name: str = "sequences",
) -> tuple[list[Array], list[dict[str, Array]]]:
    """Runs sequences `[time, *features]` concurrently.

    Args:
        engine: The model's engine.
        sequences: The inputs.
        states: Initial states of each sequence; zeros where None.
        every_output: Whether to return the outputs of all time steps.
        return_states: Whether to return the final states.
        name: The sequences' name in the request, for error messages.

    Returns:
        The outputs, and the final states (empty unless requested).

    Raises:
        NotFinite: An output or state of a sequence is not finite; the error names the sequence.
    """
    if engine.whole is not None:
        engine.whole.check(states is not None, return_states)
        return await engine.whole.run(sequences, name), []
    waiting: list[asyncio.Future[Array]] = []
    with engine.scratch([None] * len(sequences) if states is None else states) as slots:
        try:
            for number, sequence in enumerate(sequences):
                waiting.append(engine.submit(slots[number : number + 1], sequence[None], every_output).awaited)
            outputs: list[Array] = []
            for number, done in enumerate(waiting):
                try:
                    outputs.append((await done)[0])
                except NotFinite as problem:
                    raise name_sequence(problem, f"{name}[{number}]") from None
            return outputs, [engine.arena.read(int(slot)) for slot in slots] if return_states else []
        finally:
            for done in waiting:
                if not done.cancel() and not done.cancelled():
                    done.exception()  # marks it as retrieved, or asyncio would log it
