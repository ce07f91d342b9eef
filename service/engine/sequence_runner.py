"""Runs the sequences of stateless requests: through slots and ticks, or whole if the model cannot be stepped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.queue_bound import QueueBound
from cellserve.service.engine.run_errors import run_failed
from cellserve.service.engine.scheduler import Profilable
from cellserve.service.engine.state_arena import Arena, Slots
from cellserve.service.engine.stats import TickCounts
from cellserve.service.engine.work import WorkItem
from cellserve.service.errors import BodyTooLarge, InvalidInput, NotFinite, QueueFull
from cellserve.service.model_repository.model import Model
from cellserve.service.runtime.tensor_layout import unpack

Array = NDArray[Any]
States = dict[str, Array]
Numbers = NDArray[np.intp]  # of sequences in a request

_MAX_WAITING_REQUESTS = 256
_ROWS = 16  # of an item: thousands of items from one request would take long to enqueue
_ITEMS_AT_ONCE = 64  # what is done for so many takes 2 ms; then others have their turn

log = logging.getLogger("cellserve")


class SequenceRunner(Profilable, Protocol):
    """Runs whole sequences of requests that keep no session."""

    @property
    def is_idle(self) -> bool:
        """Whether it has no work of its own, beside what the engine's queues hold."""

    def may_wait(self, sequences: Sequence[Array]) -> bool:
        """Whether a request may take so long that its client may disconnect before the answer."""

    async def run(
        self,
        sequences: Sequence[Array],
        states: Sequence[States | None] | None,
        return_all_outputs: bool,
        return_states: bool,
        name: str,
        client: str = "",
    ) -> tuple[list[Array], list[States]]:
        """Runs sequences.

        Args:
            sequences: Each `[time, *features]`, validated.
            states: For each sequence, the states to start from by name; None for zeros.
            return_all_outputs: Return the outputs of all time steps, or at least the last one.
            return_states: Return the states after each sequence.
            name: What the request calls its sequences, for error messages.
            client: Whose request it is.

        Returns:
            The outputs `[time, *outputs]` of each sequence, and their last states, empty if not wanted.

        Raises:
            InvalidInput: A sequence has too few time steps, or the model has no states to start from or to return.
            BodyTooLarge: A sequence, or all of them together, have too many time steps.
            QueueFull: Too much work is waiting.
            NotFinite: An output or a state would not be finite.
            ModelFailed: ONNX Runtime could not run the model.
        """

    def close(self) -> None:
        """Frees what an idle runner holds."""


class StepEngine(Protocol):
    """The part of the engine that `SteppedSequences` uses."""

    arena: Arena
    bound: QueueBound
    max_batch: int

    def may_wait(self, steps: int, rows: int = 1) -> bool:
        """Whether new work may take so long that its client may disconnect."""

    def submit(self, slots: Slots, x: Array, return_all_outputs: bool, *, client: str) -> WorkItem:
        """Enqueues a work item."""

    def scratch(self, states: Sequence[States | None]) -> AbstractContextManager[Slots]:
        """Allocates slots for the duration of a request."""


class SteppedSequences:
    """Runs sequences through slots of the arena and shared ticks; a `SequenceRunner`.

    Args:
        engine: The engine.
        runtime: Measured for the engine's cost model.
    """

    is_idle = True  # its work waits in the engine's queues

    def __init__(self, engine: StepEngine, runtime: Profilable) -> None:
        self._engine, self._runtime = engine, runtime

    def may_wait(self, sequences: Sequence[Array]) -> bool:
        """Whether the engine may take long."""
        return self._engine.may_wait(max(map(len, sequences)), len(sequences))

    async def run(
        self,
        sequences: Sequence[Array],
        states: Sequence[States | None] | None,
        return_all_outputs: bool,
        return_states: bool,
        name: str,
        client: str = "",
    ) -> tuple[list[Array], list[States]]:
        """Allocates a slot for each sequence, advances all of them, and reads their last states."""
        engine = self._engine
        engine.bound.check(client, sum(map(len, sequences)))
        batches = by_length(sequences, lambda steps: min(_ROWS, engine.max_batch))
        items: list[WorkItem] = []
        with engine.scratch([None] * len(sequences) if states is None else states) as slots:
            try:
                for place, numbers in enumerate(batches, 1):
                    if place % _ITEMS_AT_ONCE == 0:
                        await asyncio.sleep(0)
                    x = np.stack([sequences[number] for number in numbers])
                    items.append(engine.submit(slots[numbers], x, return_all_outputs, client=client))
                ys: list[Array] = []
                final: dict[int, States] = {}
                for numbers, item in zip(batches, items, strict=True):
                    try:
                        y = await item.awaited
                        if item.errors_by_row:
                            raise item.errors_by_row[min(item.errors_by_row)]
                    except NotFinite as problem:
                        row = min(item.errors_by_row or (0,))
                        raise name_sequence(problem, f"{name}[{numbers[row]}]") from None
                    ys.append(y)
                    if return_states:
                        final |= {number: engine.arena.read(int(slots[number])) for number in numbers.tolist()}
                        await asyncio.sleep(0)
                return _in_order(batches, ys), [final[number] for number in range(len(final))]
            finally:
                for item in items:
                    done = item.awaited
                    if not done.cancel() and not done.cancelled():
                        done.exception()  # retrieved, or asyncio would log it as never retrieved

    def seconds(self, batch: int, time_steps: int) -> float:
        """Measures a run of the model."""
        return self._runtime.seconds(batch, time_steps)

    def close(self) -> None:
        """Has nothing to free."""


class WholeSequences:
    """Runs the sequences of a model that cannot be stepped, on a thread of its own; a `SequenceRunner`.

    There are no slots and no quantum: a sequence is never split and never padded.

    Args:
        model: The model.
        max_batch: Rows of a run, at most: sequences of one request that have the same length.
        max_steps: Time steps of a run over all its rows, at most: they bound the memory of a run.
        counts: Statistics of the engine; a run counts as a tick.
        bound: Bounds the time steps that wait.
    """

    def __init__(self, model: Model, max_batch: int, max_steps: int, counts: TickCounts, bound: QueueBound) -> None:
        self._counts, self._bound = counts, bound
        self._model, self._max_batch, self._max_steps = model, max_batch, max_steps
        self._executor = ThreadPoolExecutor(1, "whole")
        self._waiting = 0  # requests
        # Held by one request of each client at a time: so clients take turns on the thread.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def may_wait(self, sequences: Sequence[Array]) -> bool:
        """Always: a run cannot be interrupted."""
        return True

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._waiting

    def close(self) -> None:
        """Ends the idle thread."""
        self._executor.shutdown()

    async def run(
        self,
        sequences: Sequence[Array],
        states: Sequence[States | None] | None,
        return_all_outputs: bool,
        return_states: bool,
        name: str,
        client: str = "",
    ) -> tuple[list[Array], list[States]]:
        """Runs sequences from zeros; there are no states to start from or to return."""
        self._check(sequences, states is not None, return_states, name)
        if self._waiting >= _MAX_WAITING_REQUESTS:
            raise QueueFull(f"{self._waiting} requests are waiting for model {self._model.name!r}: try again")
        loop = asyncio.get_running_loop()
        batches, outputs = by_length(sequences, self._most_rows), []
        left = sum(map(len, sequences))
        counted = self._bound.enter(client, left)
        turn = self._turns.setdefault(client, asyncio.Lock())
        self._waiting += 1
        try:
            for numbers in batches:
                # One batch after the other, so that a cancelled request stops after the current one.
                arrived = perf_counter()
                async with turn:
                    x = np.stack([sequences[number] for number in numbers])
                    ys, start = await loop.run_in_executor(self._executor, self._run, x, numbers, name)
                rows, steps = x.shape[:2]
                self._counts.record_sequence_batch(rows, rows * steps, start - arrived, perf_counter() - start)
                outputs.append(ys)
                left -= rows * steps
                self._bound.leave(client, rows * steps, counted)
        finally:
            self._waiting -= 1
            if left:
                self._bound.leave(client, left, counted)
        return _in_order(batches, outputs), []

    def _check(self, sequences: Sequence[Array], states: bool, return_states: bool, name: str) -> None:
        signature = self._model.runtime.signature
        if states or return_states:
            place = "states" if states else "return_states"
            raise InvalidInput(
                f"{place}: model {self._model.name!r} only runs whole sequences from zeros, "
                f"{signature.predict_only}: leave it out",
                place=place,
            )
        for number, sequence in enumerate(sequences):
            place = f"{name}[{number}]"
            if len(sequence) < signature.min_steps:
                raise InvalidInput(
                    f"{place}: {len(sequence)} time steps, but the model needs at least {signature.min_steps}",
                    place=place,
                )
            if len(sequence) > self._max_steps:
                raise BodyTooLarge(
                    f"{place}: {len(sequence)} time steps, and the model runs each sequence whole: "
                    f"send at most {self._max_steps}",
                    limit=self._max_steps,
                )

    def seconds(self, batch: int, time_steps: int) -> float:
        """Returns 0: the engine runs no ticks of such a model, and it may not run on so few time steps at all."""
        return 0.0

    def _most_rows(self, steps: int) -> int:
        return max(1, min(self._max_batch, self._max_steps // steps))

    def _run(self, x: Array, numbers: Numbers, name: str) -> tuple[Array, float]:
        """Returns the outputs, and the start of the run in seconds of `time.perf_counter`."""
        runtime, start = self._model.runtime, perf_counter()
        try:
            y, _ = runtime.run(x, np.full(len(x), x.shape[1], np.int32), runtime.zeros(len(x)))
        except Exception as error:
            if not runtime.has_lost_device(error):
                log.error("model %s failed: %s", self._model.name, error)
            raise run_failed(self._model, error) from None
        for row, number in enumerate(numbers):
            if not all(np.isfinite(part).all() for part in unpack(y[row])):
                place = f"{name}[{number}]"
                raise NotFinite(f"{place}: the model's output is not finite", place=place)
        return y, start


def by_length(sequences: Sequence[Array], most_rows: Callable[[int], int]) -> list[Numbers]:
    """Returns the numbers of sequences of the same length, in batches of at most so many rows for a length."""
    numbers_of: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        numbers_of.setdefault(len(sequence), []).append(number)
    batches = []
    for steps, numbers in numbers_of.items():
        rows = most_rows(steps)
        every = np.array(numbers, np.intp)
        batches += [every[start : start + rows] for start in range(0, len(every), rows)]
    return batches


def _in_order(batches: list[Numbers], ys: list[Array]) -> list[Array]:
    """Returns the outputs of each sequence, from those of batches."""
    outputs = {
        number: y
        for numbers, rows in zip(batches, ys, strict=True)
        for number, y in zip(numbers.tolist(), rows, strict=True)
    }
    return [outputs[number] for number in range(len(outputs))]


def name_sequence(problem: NotFinite, place: str) -> NotFinite:
    """Turns the problem of one sequence into one of the request, which names the sequence."""
    return NotFinite(f"{place}: {problem.detail}", place=place, **problem.extensions)
