"""The engine: gathers waiting work from all requests into ticks, each one run of ONNX Runtime over a batch of slots.

All work is an advance: move the states in some slots by these time steps. Requests join and leave between ticks
(cellular batching: Gao et al., Low Latency RNN Inference with Cellular Batching, EuroSys 2018); no timer waits to fill
a batch, what arrives during a tick makes the next. A tick that is predicted to be cheap runs in the event loop, a
costly one on a thread, while cheap ones of short advances go on beside it: a long sequence never holds up a step.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.scheduler import Advance, Completion, CompletionSink, Cost, Lane, Moved, Tick, Tracing
from cellserve.service.engine.sequence_runner import WholeRuns
from cellserve.service.engine.state_arena import Arena, Slots
from cellserve.service.engine.stats import TickCounts
from cellserve.service.errors import ModelFailed, NotFinite, Problem, QueueFull
from cellserve.service.idempotency import Request
from cellserve.service.model_repository.repository import Model
from cellserve.service.runtime.tensor_layout import parts
from cellserve.service.settings import Settings

Array = NDArray[Any]

_FULL_ROWS = 64
_SLACK = 0.75  # of the time that the event loop has for a tick is planned for: predictions are not exact
_GATHERING_TURNS = 3  # of the event loop, each a few microseconds where nothing has arrived
_LONG_WAIT_SECONDS = 0.02

log = logging.getLogger("cellserve")


@dataclass(slots=True)
class Ran:
    """What came out of a tick: y `[batch, time, *outputs]`, the next states, and the rows that failed."""

    y: Array
    states: list[Array]
    failed: dict[int, Exception]
    steps: int = 0  # time steps that were computed, over all rows
    start: float = 0.0  # seconds of time.perf_counter
    took: float = 0.0  # seconds
    rerun: bool = False  # row by row


class Engine:
    """Runs one model's advances, tick after tick.

    Args:
        model: The model; where it is not exact, each tick is one row and one time step, the one shape that always
            gives the same bits.
        settings: Batch size, quantum, bounds.
        executor: One thread for runs that would hold up the event loop for too long.
        tracing: Records the spans of requests, where they are traced.
    """

    def __init__(
        self, model: Model, settings: Settings, executor: ThreadPoolExecutor, tracing: Tracing | None = None
    ) -> None:
        self.model = model
        # Sequences in flight have slots too, beside the sessions'.
        self.arena = Arena(model.runtime.signature.states, settings.held_sessions + settings.max_queued_steps)
        exact = model.exactness.proved
        self.max_batch = settings.max_batch if exact else 1
        self.counts = TickCounts()
        cannot = model.runtime.signature.predict_only is not None
        whole = self.max_batch, settings.max_whole_steps, self.counts
        self.whole = WholeRuns(model, *whole) if cannot else None
        if cannot:
            self.submit = self._refuse  # type: ignore[method-assign]  # costs the others nothing
        self._quantum = settings.quantum if exact else 1
        self._inline_seconds = settings.inline_microseconds / 1e6
        self._max_queued = settings.max_queued_steps
        self._executor = executor
        self._cost = Cost(self.whole or model.runtime, self.max_batch)
        # What a full tick can do in the event loop's time counts as short.
        rows = min(self.max_batch, _FULL_ROWS)
        self._short_steps = (
            max((steps for steps in range(self._quantum) if self._is_cheap(rows, steps + 1)), default=0) + 1
        )
        cheap_seconds = _SLACK * self._inline_seconds
        self._short = Lane(self._cost, self.max_batch, self._quantum, cheap_seconds)
        self._long = Lane(self._cost, self.max_batch, self._quantum, cheap_seconds)
        self._lanes = [self._short, self._long]
        self.tracing = tracing
        self.queued = 0  # time steps that wait, over all slots
        self._committing: set[asyncio.Task[None]] = set()
        self._scheduled = False  # a turn of the event loop is to come
        self._on_thread = False  # a tick is under way on the thread

    def submit(
        self,
        slots: Slots,
        x: Array,
        every_output: bool,
        done: Completion | None = None,
        sink: CompletionSink | None = None,
        keys: Sequence[Request] | None = None,
        before: Sequence[dict[str, Array] | None] | None = None,
    ) -> Advance:
        """Queues an advance.

        Args:
            slots: `[rows]`, the slots to move, `max_batch` at most; no other advance of them may be waiting.
            x: `[rows, time, *features]`, checked.
            every_output: Whether the outputs of all time steps are wanted.
            done: What to tell the end; a future where it is left out.
            sink: Keeps the sessions whose slots they are, which outlive the request and must each move as a whole or
                not at all; it learns the end in the moment when it comes, whoever waits for the answer.
            keys: By row, the change that it is; for the sink.
            before: By row, the states before it; for the sink.

        Returns:
            The advance. Its `done` gives `y [rows, time, *outputs]` (time is 1 where the last output is wanted);
            cancelling it drops what has not been computed. What befell single rows is in `problems`: they have not
            moved; where there is one row only, `done` raises it.

        Raises:
            QueueFull: More time steps would wait than may.
        """
        rows, steps = x.shape[:2]
        if self.queued and self.queued + rows * steps > self._max_queued:
            raise QueueFull(
                f"{self.queued} time steps are waiting for model {self.model.name!r}: try again in a second"
            )
        loop = asyncio.get_running_loop()
        own = self._copied(slots) if sink is not None and steps > self._quantum else slots
        done = done or loop.create_future()
        advance = Advance(x, rows, steps, own, slots, every_output, sink, keys, before, done)
        if self.tracing is not None:
            advance.trace = self.tracing.here()
        (self._short if steps <= self._short_steps else self._long).append(advance)
        self.queued += rows * steps
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._gather, 0)
        return advance

    def borrow(self, count: int) -> Slots:
        """Takes slots for the length of a request, their states zero; the arena takes them back.

        Raises:
            QueueFull: There are not so many.
        """
        slots = self.arena.take_many(count)
        if slots is None:
            raise QueueFull(f"too many sequences are in flight for model {self.model.name!r}: try again in a second")
        return slots

    @contextmanager
    def scratch(self, states: Sequence[dict[str, Array] | None]) -> Iterator[Slots]:
        """Gives slots for the length of a request, one for each of these states by name; None for zeros.

        Raises:
            QueueFull: There are not so many.
        """
        slots = self.borrow(len(states))
        try:
            for slot, own in zip(slots.tolist(), states, strict=True):
                if own is not None:
                    self.arena.write(slot, own)
            yield slots
        finally:
            self.arena.give_back(slots)

    def _refuse(self, *work: Any, **more: Any) -> NoReturn:
        self.model.check_steppable()
        raise AssertionError("models that can be stepped do not get here")

    @property
    def is_idle(self) -> bool:
        """Whether no session or sequence has a slot, and nothing is under way."""
        busy = self.arena.taken or self.queued or self._on_thread or self._committing
        return not busy and (self.whole is None or self.whole.is_idle)

    def close(self) -> None:
        """Frees the model and the arena of an idle engine, whoever still refers to it."""
        if self.whole is not None:
            self.whole.close()
        self.model.runtime.close()
        self.arena.free()

    @property
    def is_behind(self) -> bool:
        """Whether what arrives now will wait for so long that its client may be gone before it is computed."""
        return self.queued > self.max_batch and (
            self._cost.predict(self.max_batch, self.queued // self.max_batch) > _LONG_WAIT_SECONDS
        )

    def _is_cheap(self, rows: int, steps: int) -> bool:
        return self._cost.predict(rows, steps) <= self._inline_seconds

    def _copied(self, slots: Slots) -> Slots:
        copies = self.borrow(len(slots))
        self.arena.copy(slots, copies)
        return copies

    def _gather(self, seen: int, turns: int = 0) -> None:
        """Lets what has arrived already join the tick: it comes again while that makes the queue grow."""
        waiting = self._short.waiting + self._long.waiting
        if waiting > seen and waiting < self.max_batch and turns < _GATHERING_TURNS:
            asyncio.get_running_loop().call_soon(self._gather, waiting, turns + 1)
        else:
            self._turn()

    def _turn(self) -> None:
        """Runs a tick of each lane that can run now, and comes again while there is work."""
        self._scheduled = False
        again = [self._start(lane) for lane in tuple(self._lanes)]
        if any(again) and not self._scheduled:
            self._scheduled = True
            # By way of the event loop, so that what has arrived meanwhile joins the next tick.
            asyncio.get_running_loop().call_soon(self._gather, 0)

    def _start(self, lane: Lane) -> bool:
        """Runs or begins the next tick of a lane; says whether another could follow at once."""
        if not lane.waiting:
            return False
        steps, rows = lane.plan()
        cheap = self._is_cheap(rows, steps)
        if not cheap and self._on_thread:
            return False
        tick = lane.take(steps)
        for advance in tick.dropped:
            self._end(advance)
        if not tick.advances:
            return lane.waiting > 0
        try:
            x, lengths, slots = tick.inputs()
            states = self.arena.gather(slots)
        except Exception as error:
            self._fail(tick, error)
            return lane.waiting > 0
        if cheap:
            self._apply(tick, slots, lengths, states, self._run(x, lengths, states))
            return lane.waiting > 0
        self._on_thread = True
        self._lanes.sort(key=lambda other: other is lane)  # where both are costly they take turns

        def finish(run: asyncio.Future[Ran]) -> None:
            self._on_thread = False
            self._apply(tick, slots, lengths, states, run.result())
            self._turn()

        loop = asyncio.get_running_loop()
        loop.run_in_executor(self._executor, self._run, x, lengths, states).add_done_callback(finish)
        return False

    def _run(self, x: Array, lengths: NDArray[np.int32], states: list[Array]) -> Ran:
        """Runs a tick; one that fails is run again row by row, so that only the guilty rows fail."""
        start = time.perf_counter()
        try:
            y, following = self.model.runtime.run(x, lengths, states)
        except Exception as error:
            log.error("model %s failed: %s", self.model.name, error)
            ran = self._run_rows(x, lengths, states, error)
            ran.steps, ran.rerun = int(lengths.sum()), True
            ran.start, ran.took = start, time.perf_counter() - start
            return ran
        took = time.perf_counter() - start
        self._cost.learn(x.shape[0], x.shape[1], took)
        return Ran(y, following, {}, x.shape[0] * x.shape[1], start, took)

    def _run_rows(self, x: Array, lengths: NDArray[np.int32], states: list[Array], error: Exception) -> Ran:
        signature = self.model.runtime.signature
        y = self.model.outputs.zeros(*x.shape[:2])
        if len(x) == 1:
            return Ran(y, states, {0: error})
        following = [state.copy() for state in states]
        failed: dict[int, Exception] = {}
        for row, length in enumerate(lengths):
            own = [np.take(state, [row], spec.batch_axis) for state, spec in zip(states, signature.states, strict=True)]
            inputs = np.ascontiguousarray(x[row : row + 1, :length]), lengths[row : row + 1], own
            try:
                y[row, :length], moved = self.model.runtime.run(*inputs)
            except Exception as its_own:
                failed[row] = its_own
                continue
            for spec, state, rows in zip(signature.states, following, moved, strict=True):
                np.moveaxis(state, spec.batch_axis, 0)[row] = np.moveaxis(rows, spec.batch_axis, 0)[0]
        return Ran(y, following, failed)

    def _apply(self, tick: Tick, slots: Slots, lengths: NDArray[np.int32], before: list[Array], ran: Ran) -> None:
        """Moves the states and hands out the outputs; what failed, is not finite or not wanted any more stays."""
        y = ran.y
        rows = len(lengths)
        taken = sum(tick.lengths) if rows == len(tick.advances) else int(lengths.sum())
        self.counts.ran(tick.advances, rows, ran.steps - taken, taken, ran.start, ran.took)
        self.counts.rerun += ran.rerun
        if self.tracing is not None:
            self.tracing.ran(tick.advances, ran.start, ran.took)
        try:
            if not (ran.failed or any([advance.done.cancelled() for advance in tick.advances])) and _all_finite(ran):  # noqa: C419
                self.arena.scatter(slots, ran.states)
            else:
                self._scatter_good(tick, slots, ran)
                tick.whole = False
        except Exception as error:
            self.arena.scatter(slots, before)
            self._fail(tick, error)
            return
        if tick.whole:
            self.queued -= taken
            self._commit(tick.answers(y), slots, lengths)
            return
        start = 0
        moved: list[Moved] = []
        for advance, length in zip(tick.advances, tick.lengths, strict=True):
            stop = start + advance.rows
            whole = self._advanced(advance, y[start:stop, :length], length)
            if whole is not None:
                moved.append((advance, whole))
            start = stop
        if moved:
            self._commit(moved)

    def _commit(self, moved: list[Moved], slots: Slots | None = None, steps: Array | None = None) -> None:
        """Ends advances that have taken all of their time steps, when what they have come to is written.

        Args:
            moved: The advances.
            slots: `[rows]`, all of their slots where they are a whole tick, of which nothing failed.
            steps: `[rows]`, by how many time steps those have moved.
        """
        kept = [one for one in moved if one[0].sink is not None]
        sink = kept[0][0].sink if kept else None
        writing = sink.commit(self, kept) if sink is not None else None
        if writing is None:
            self._complete(moved, kept, slots, steps)
            return
        task = asyncio.get_running_loop().create_task(self._committed(writing, moved, kept, slots, steps))
        self._committing.add(task)
        task.add_done_callback(self._committing.discard)

    async def _committed(
        self, writing: Awaitable[None], moved: list[Moved], kept: list[Moved], slots: Slots | None, steps: Array | None
    ) -> None:
        start = time.perf_counter()
        try:
            await writing
        except Exception as error:
            log.error("what a tick of model %s has come to was not written", self.model.name, exc_info=error)
            for advance, _ in kept:
                advance.problems = dict.fromkeys(range(advance.rows), self._failed())
        took = time.perf_counter() - start
        self.counts.store.note(took)
        if self.tracing is not None:
            self.tracing.stored([advance for advance, _ in kept], start, took)
        if any(advance.problems or advance.done.cancelled() for advance, _ in moved):
            slots = steps = None
        self._complete(moved, kept, slots, steps)

    def _complete(self, moved: list[Moved], kept: list[Moved], slots: Slots | None, steps: Array | None) -> None:
        """Ends advances that are written: a whole tick at once, which nearly every tick of single steps is."""
        if slots is None or steps is None:
            for one in moved:
                self._end(*one)
            return
        if kept:
            sink = kept[0][0].sink
            assert sink is not None
            if len(kept) == len(moved):
                reached = sink.completed(self, kept, slots, steps).tolist()
            else:
                rows = np.repeat([one.sink is not None for one, _ in moved], [one.rows for one, _ in moved])
                positions = np.zeros(len(slots), np.int64)
                positions[rows] = sink.completed(self, kept, slots[rows], steps[rows])
                reached = positions.tolist()
            start = 0
            for advance, y in moved:
                advance.reached = reached[start : start + advance.rows]
                start += advance.rows
                advance.done.set_result(y)
        else:
            for advance, y in moved:
                advance.done.set_result(y)

    def _fail(self, tick: Tick, error: Exception) -> None:
        """Ends all advances of a tick that could not be made; none has moved."""
        log.error("a tick of model %s failed", self.model.name, exc_info=error)
        self.counts.failed += 1
        for advance in tick.advances:
            advance.problems = dict.fromkeys(range(advance.rows), self._failed())
            self._end(advance)

    def _failed(self) -> ModelFailed:
        return ModelFailed(f"ONNX Runtime could not run model {self.model.name!r} on this request: nothing was applied")

    def _scatter_good(self, tick: Tick, slots: Slots, ran: Ran) -> None:
        start, kept = 0, []
        for advance, length in zip(tick.advances, tick.lengths, strict=True):
            rows = range(start, start + advance.rows)
            start = rows.stop
            if not advance.done.cancelled():
                self._note_problems(advance, rows, length, ran)
                kept += [row for row in rows if row - rows.start not in (advance.problems or ())]
        if kept:
            specs = self.arena.specs
            states = [np.take(state, kept, spec.batch_axis) for state, spec in zip(ran.states, specs, strict=True)]
            self.arena.scatter(slots[kept], states)

    def _advanced(self, advance: Advance, y: Array, taken: int) -> Array | None:
        """Notes what one tick did for an advance; gives y where it has moved as a whole."""
        advance.position += taken
        advance.remaining -= taken
        self.queued -= taken * advance.rows
        if advance.done.cancelled() or (advance.problems and len(advance.problems) == advance.rows):
            self._end(advance)
            return None
        if advance.remaining:
            if advance.every_output:
                advance.outputs = [*(advance.outputs or ()), y]
            (self._short if advance.x.shape[1] <= self._short_steps else self._long).append(advance)
            return None
        if advance.slots is not advance.homes:
            moved = [row for row in range(advance.rows) if row not in (advance.problems or ())]
            self.arena.copy(advance.slots[moved], advance.homes[moved])
        if not advance.every_output:
            y = y[:, -1:]
        elif advance.outputs:
            y = np.concatenate([*advance.outputs, y], axis=1)
        return y

    def _end(self, advance: Advance, y: Array | None = None) -> None:
        """Ends an advance that has moved, but for the rows with problems, and given y; or, without y, that has not."""
        if y is None:
            self.queued -= advance.remaining * advance.rows
        if advance.slots is not advance.homes:
            self.arena.give_back(advance.slots)
        problems = advance.problems or {}
        if advance.sink is not None:
            still = [row for row in range(advance.rows) if y is None or row in problems]
            if y is not None and len(still) < advance.rows:
                moved = advance.homes[[row for row in range(advance.rows) if row not in problems]]
                advance.sink.completed(self, [(advance, y)], moved, np.full(len(moved), advance.x.shape[1]))
            if still:
                advance.sink.failed(self, advance, advance.homes[still])
            advance.reached = self.arena.position[advance.homes].tolist()
        if advance.done.done():
            return
        if problems and advance.rows == 1:
            advance.done.set_exception(problems[0])
        elif y is not None:
            advance.done.set_result(y)
        else:
            steps_given = advance.x.shape[1] if advance.every_output else 1
            advance.done.set_result(self.model.outputs.zeros(advance.rows, steps_given))

    def _note_problems(self, advance: Advance, rows: range, length: int, ran: Ran) -> None:
        """Notes which rows of an advance failed, or are not finite at a valid time step or in a next state."""
        specs = self.arena.specs
        problems: dict[int, Problem] = advance.problems or {}
        for row in rows:
            place = row - rows.start
            if place in problems:
                continue
            if row in ran.failed:
                problems[place] = self._failed()
                continue
            each = (np.isfinite(part).reshape(length, -1).all(axis=1) for part in parts(ran.y[row, :length]))
            finite = np.logical_and.reduce(list(each))
            states = (np.take(state, row, spec.batch_axis) for state, spec in zip(ran.states, specs, strict=True))
            if not finite.all():
                problems[place] = _not_finite(advance.position + int(np.argmin(finite)), None)
            elif not all(np.isfinite(state).all() for state in states):
                problems[place] = _not_finite(advance.position, advance.position + length - 1)
        advance.problems = problems or None


def _all_finite(ran: Ran) -> bool:
    with np.errstate(invalid="ignore", over="ignore"):
        # A sum that is finite has only finite summands, and costs half as much as looking at each.
        return all(math.isfinite(array.sum()) or np.isfinite(array).all() for array in (*parts(ran.y), *ran.states))


def _not_finite(first: int, last: int | None) -> Problem:
    where = f"step {first}" if last is None or last == first else f"one of the steps {first} to {last}"
    return NotFinite(
        f"the model's output or next state is not finite after {where} of the request, nothing was applied: "
        f"send inputs (and states) of the size that the model was trained on",
        step=first,
    )
