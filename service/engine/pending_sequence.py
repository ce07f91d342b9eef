"""One sequence of a stateless request that nobody awaits: the prediction of the fast path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.pending import Pending
from cellserve.service.engine.state_arena import Slots

Array = NDArray[Any]


class SequenceResult(NamedTuple):
    """The result of one sequence."""

    y: Array  # [time, *outputs]; time is 1 if only the last output is returned
    states: dict[str, Array] | None  # the final states, if requested


class PendingSequence(Pending):
    """One sequence in flight, in a slot of its own, which it releases at the end.

    Args:
        engine: The model's engine.
        slots: `[1]`, the slot.
        return_states: Whether to return the final states.
        on_done: Called within the tick with the result or the error, or with what it raised for the result.
    """

    __slots__ = ("_engine", "_return_states", "_slots")

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
        """Drops what has not been computed; the callback is not called any more."""
        if not self.done():
            super().cancel()
            self._engine.arena.release(self._slots)

    def set_result(self, y: Array) -> None:
        """Completes it."""
        self._state = 1
        arena = self._engine.arena
        states = arena.read(int(self._slots[0])) if self._return_states else None
        arena.release(self._slots)
        try:
            self._on_done(SequenceResult(y[0], states))
        except Exception as error:  # the other work of the tick goes on
            self._on_done(error)
        self._let_go()

    def set_exception(self, error: BaseException) -> None:
        """Completes it with an error."""
        self._state = 1
        self._engine.arena.release(self._slots)
        if isinstance(error, Exception):
            self._on_done(error)
        self._let_go()


def start_sequence(
    engine: Engine,
    x: Array,
    return_all_outputs: bool,
    return_states: bool,
    on_done: Callable[[SequenceResult | Exception], None],
    client: str = "",
) -> PendingSequence:
    """Starts a sequence from zeros.

    Args:
        engine: The engine of a model that can be stepped.
        x: `[time, *features]`, validated.
        return_all_outputs: Whether to return the outputs of all time steps.
        return_states: Whether to return the final states.
        on_done: Called within the tick with the result or the error, or with what it raised for the result.
        client: Whose request it is.

    Raises:
        BodyTooLarge, QueueFull: Too much work is waiting, or too many sequences are in flight.
    """
    slots = engine.borrow(1)
    pending = PendingSequence(engine, slots, return_states, on_done)
    try:
        pending.item = engine.submit(slots, x[None], return_all_outputs, pending, client=client)
    except Exception:
        engine.arena.release(slots)
        raise
    return pending
