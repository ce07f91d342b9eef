"""The engine: gathers waiting work from all requests into ticks, each one run of ONNX Runtime over a batch of slots.

All work is an advance: move the states in some slots by these time steps. Requests join and leave between ticks
(cellular batching: Gao et al., Low Latency RNN Inference with Cellular Batching, EuroSys 2018); no timer waits to fill
a batch, what arrives during a tick makes the next. A tick that is predicted to be cheap runs in the event loop, a
costly one on a thread, while cheap ones of short advances go on beside it: a long sequence never holds up a step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.arena import Arena, Slots
from service.errors import ModelFailed, NotFinite, Problem, QueueFull
from service.repository import Model
from service.settings import Settings
from service.ticks import Advance, Cost, Tick, choose

Array = NDArray[Any]

_LONG_WAIT_SECONDS = 0.02

log = logging.getLogger("cellserve")


@dataclass(frozen=True, slots=True)
class Ran:
    """What came out of a tick: y `[batch, time, *outputs]`, the next states, and the rows that failed."""

    y: Array
    states: list[Array]
    failed: dict[int, Exception]


class Engine:
    """Runs one model's advances, tick after tick.

    Args:
        model: The model; where it is not exact, each tick is one row and one time step, the one shape that always
            gives the same bits.
        settings: Batch size, quantum, bounds.
        executor: One thread for runs that would hold up the event loop for too long.
    """

    def __init__(self, model: Model, settings: Settings, executor: ThreadPoolExecutor) -> None:
        self.model = model
        # Sequences in flight have slots too, beside the sessions'.
        self.arena = Arena(model.runtime.signature.states, settings.max_sessions + settings.max_queued_steps)
        exact = model.exactness.proved
        self.max_batch = settings.max_batch if exact else 1
        self._quantum = settings.quantum if exact else 1
        self._inline_seconds = settings.inline_microseconds / 1e6
        self._max_queued = settings.max_queued_steps
        self._executor = executor
        self._cost = Cost(model.runtime, self.max_batch)
        # What a full tick can do in the event loop's time counts as short.
        full = [steps for steps in range(1, self._quantum + 1) if self._is_cheap(self.max_batch, steps)]
        self._short_steps = max(full, default=1)
        self._short: deque[Advance] = deque()
        self._long: deque[Advance] = deque()
        self._lanes = [self._short, self._long]
        self.queued = 0  # time steps that wait, over all slots
        self._scheduled = False  # a turn of the event loop is to come
        self._on_thread = False  # a tick is under way on the thread

    def submit(
        self, slots: Slots, x: Array, every_output: bool, applied: Callable[[Advance], None] | None = None
    ) -> Advance:
        """Queues an advance.

        Args:
            slots: `[rows]`, the slots to move, `max_batch` at most; no other advance of them may be waiting.
            x: `[rows, time, *features]`, checked.
            every_output: Whether the outputs of all time steps are wanted.
            applied: Given for slots that outlive the request and must each move as a whole or not at all; it is called
                in the moment when they have moved, whoever still waits for the answer.

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
        own = slots if applied is None or steps <= self._quantum else self._copied(slots)
        advance = Advance(x, own, slots, every_output, loop.create_future(), applied)
        (self._short if steps <= self._short_steps else self._long).append(advance)
        self.queued += rows * steps
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._turn)
        return advance

    @property
    def is_behind(self) -> bool:
        """Whether what arrives now will wait for so long that its client may be gone before it is computed."""
        return self.queued > self.max_batch and (
            self._cost.predict(self.max_batch, self.queued // self.max_batch) > _LONG_WAIT_SECONDS
        )

    def _is_cheap(self, rows: int, steps: int) -> bool:
        return self._cost.predict(rows, steps) <= self._inline_seconds

    def _copied(self, slots: Slots) -> Slots:
        copies = self.arena.take_many(len(slots))
        if copies is None:
            raise QueueFull(f"too many sequences are in flight for model {self.model.name!r}: try again in a second")
        self.arena.copy(slots, copies)
        return copies

    def _turn(self) -> None:
        """Runs a tick of each lane that can run now, and comes again while there is work."""
        self._scheduled = False
        again = [self._start(lane) for lane in tuple(self._lanes)]
        if any(again) and not self._scheduled:
            self._scheduled = True
            # By way of the event loop, so that what has arrived meanwhile joins the next tick.
            asyncio.get_running_loop().call_soon(self._turn)

    def _start(self, lane: deque[Advance]) -> bool:
        """Runs or begins the next tick of a lane; says whether another could follow at once."""
        while lane and lane[0].done.cancelled():
            self._end(lane.popleft())
        if not lane:
            return False
        rows = min(sum(advance.rows for advance in lane) if len(lane) < self.max_batch else self.max_batch,
                   self.max_batch)  # fmt: skip
        cheap = self._is_cheap(rows, min(lane[0].remaining, self._quantum))
        if not cheap and self._on_thread:
            return False
        tick = choose(lane, self.max_batch, self._quantum)
        for advance in tick.dropped:
            self._end(advance)
        x, lengths, slots = tick.inputs()
        states = self.arena.gather(slots)
        if cheap:
            self._apply(tick, slots, self._run(x, lengths, states))
            return bool(lane)
        self._on_thread = True
        self._lanes.sort(key=lambda other: other is lane)  # where both are costly they take turns

        def finish(run: asyncio.Future[Ran]) -> None:
            self._on_thread = False
            self._apply(tick, slots, run.result())
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
            return self._run_rows(x, lengths, states, error)
        self._cost.learn(x.shape[0], x.shape[1], time.perf_counter() - start)
        return Ran(y, following, {})

    def _run_rows(self, x: Array, lengths: NDArray[np.int32], states: list[Array], error: Exception) -> Ran:
        signature = self.model.runtime.signature
        y = np.zeros((*x.shape[:2], *signature.outputs[0].shape), signature.outputs[0].dtype)
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

    def _apply(self, tick: Tick, slots: Slots, ran: Ran) -> None:
        """Moves the states and hands out the outputs; what failed, is not finite or not wanted any more stays."""
        y, clean = ran.y, not ran.failed and self._all_finite(ran)
        start, kept = 0, []
        for advance, length in zip(tick.advances, tick.lengths, strict=True):
            rows = range(start, start + advance.rows)
            start = rows.stop
            if advance.done.cancelled():
                continue
            if not clean:
                self._note_problems(advance, rows, length, ran)
            kept += [row for row in rows if row - rows.start not in advance.problems]
        if len(kept) == len(slots):
            self.arena.scatter(slots, ran.states)
        elif kept:
            specs = self.arena.specs
            states = [np.take(state, kept, spec.batch_axis) for state, spec in zip(ran.states, specs, strict=True)]
            self.arena.scatter(slots[kept], states)
        start = 0
        for advance, length in zip(tick.advances, tick.lengths, strict=True):
            self._advanced(advance, y[start : start + advance.rows, :length])
            start += advance.rows

    def _advanced(self, advance: Advance, y: Array) -> None:
        """Notes what one tick did for an advance: it has ended, or waits for its next tick."""
        taken = y.shape[1]
        advance.position += taken
        self.queued -= taken * advance.rows
        if advance.done.cancelled() or len(advance.problems) == advance.rows:
            self._end(advance)
            return
        if advance.every_output:
            advance.outputs.append(y)
        if advance.remaining:
            (self._short if advance.x.shape[1] <= self._short_steps else self._long).append(advance)
            return
        if advance.slots is not advance.homes:
            moved = [row for row in range(advance.rows) if row not in advance.problems]
            self.arena.copy(advance.slots[moved], advance.homes[moved])
        self._end(advance)
        if advance.applied:
            advance.applied(advance)
        if not advance.every_output:
            y = y[:, -1:]
        elif len(advance.outputs) > 1:
            y = np.concatenate(advance.outputs, axis=1)
        advance.done.set_result(y)

    def _end(self, advance: Advance) -> None:
        self.queued -= advance.remaining * advance.rows
        if advance.slots is not advance.homes:
            self.arena.give_back(advance.slots)
        if not advance.done.done() and advance.problems:
            if advance.rows == 1:
                advance.done.set_exception(advance.problems[0])
            elif len(advance.problems) == advance.rows:
                steps = advance.x.shape[1] if advance.every_output else 1
                advance.done.set_result(np.zeros((advance.rows, steps, *self.model.output_shape)))

    def _all_finite(self, ran: Ran) -> bool:
        return all(np.isfinite(array).all() for array in (ran.y, *ran.states))

    def _note_problems(self, advance: Advance, rows: range, length: int, ran: Ran) -> None:
        """Notes which rows of an advance failed, or are not finite at a valid time step or in a next state."""
        specs = self.arena.specs
        for row in rows:
            place = row - rows.start
            if place in advance.problems:
                continue
            if row in ran.failed:
                advance.problems[place] = ModelFailed(
                    f"ONNX Runtime could not run model {self.model.name!r} on this request"
                )
                continue
            finite = np.isfinite(ran.y[row, :length]).reshape(length, -1).all(axis=1)
            states = (np.take(state, row, spec.batch_axis) for state, spec in zip(ran.states, specs, strict=True))
            if not finite.all():
                advance.problems[place] = _not_finite(advance.position + int(np.argmin(finite)), None)
            elif not all(np.isfinite(state).all() for state in states):
                advance.problems[place] = _not_finite(advance.position, advance.position + length - 1)


def _not_finite(first: int, last: int | None) -> Problem:
    where = f"step {first}" if last is None or last == first else f"one of the steps {first} to {last}"
    return NotFinite(
        f"the model's output or next state is not finite after {where} of the request, nothing was applied: "
        f"send inputs (and states) of the size that the model was trained on",
        step=first,
    )
