"""The engine: batches waiting work of all requests into ticks, each one run of ONNX Runtime over a batch of slots.

Everything is a work item: advance the states in some slots by these time steps. Requests join and leave between ticks
(cellular batching: Gao et al., Low Latency RNN Inference with Cellular Batching, EuroSys 2018). No timer waits to fill
a batch: what arrives during a tick makes the next one. A tick that is predicted to be cheap runs in the event loop, a
costly one on a thread, while cheap ticks of short items continue beside it: a long sequence never delays a step.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.batch_run import BatchResult, States, is_finite, record_row_problems, run_batch
from cellserve.service.engine.device_arena import DeviceArena
from cellserve.service.engine.queue_bound import QueueBound
from cellserve.service.engine.run_errors import run_failed
from cellserve.service.engine.scheduler import CostModel, RequestQueue, Tick
from cellserve.service.engine.sequence_runner import SequenceRunner, SteppedSequences, WholeSequences
from cellserve.service.engine.state_arena import Arena, Slots
from cellserve.service.engine.stats import TickCounts
from cellserve.service.engine.work import Completion, CompletionSink, Finished, Tracing, WorkItem
from cellserve.service.errors import QueueFull, StoreUnavailable
from cellserve.service.idempotency import IdempotencyKey
from cellserve.service.model_repository.model import Model
from cellserve.service.settings import Settings

Array = NDArray[Any]

_FULL_ROWS = 64
_BUDGET_SHARE = 0.75  # fraction of the event loop's time budget that a tick is planned to use; predictions are rough
# Event loop iterations: a few microseconds if nothing has arrived, half a millisecond while bodies are being read.
_COALESCE_ITERATIONS = 10
_MOST_SHORT = 4  # time steps of an item
_LONG_WAIT_SECONDS = 0.02

log = logging.getLogger("cellserve")


def make_arena(model: Model, limit: int) -> Arena:
    """Returns an arena for a model's states, where its runtime keeps them."""
    states, on_device = model.runtime.signature.states, model.runtime.on_device
    return Arena(states, limit) if on_device is None else DeviceArena(states, limit, on_device.tables())


class Engine:
    """Runs the work items of one model, tick after tick.

    Args:
        model: The model. If no shapes of runs make it batch invariant, each tick is one row and one time step, the one
            shape that always gives the same bits.
        settings: Batch size, quantum, bounds.
        executor: One thread for runs that would block the event loop for too long.
        tracing: Records the spans of requests, if they are traced.
    """

    def __init__(
        self, model: Model, settings: Settings, executor: ThreadPoolExecutor, tracing: Tracing | None = None
    ) -> None:
        self.model = model
        # Sequences in flight need slots too, beside those of sessions.
        self.arena = make_arena(model, settings.held_sessions + settings.max_queued_steps)
        self.max_batch = settings.max_batch if model.runs_batches else 1
        self.counts = TickCounts()
        self.bound = QueueBound(model.name, settings.max_queued_steps, settings.max_queued_steps_per_client)
        # The runner refers to the engine weakly: without a cycle, an unloaded engine is freed as soon as it is unused.
        self.sequences: SequenceRunner = (
            SteppedSequences(weakref.proxy(self), model.runtime)
            if model.runtime.signature.predict_only is None
            else WholeSequences(model, self.max_batch, settings.max_whole_steps, self.counts, self.bound)
        )
        # Where a model's bits hold in fixed shapes only, its runs have one of these.
        most_steps = (settings.quantum, *model.runtime.shapes.step_sizes[-1:])
        self._quantum = min(most_steps) if model.runs_batches else 1
        self._inline_seconds = settings.inline_microseconds / 1e6
        self._executor = executor
        self._clock = model.runtime.clock
        self._cost = CostModel(self.sequences, self.max_batch, self._quantum)
        # Short items are those that a full tick can run within the event loop's time budget, and a few steps long:
        # ticks are of rows that are alike, so single steps would wait while longer items have their turns.
        rows = min(self.max_batch, _FULL_ROWS)
        most = min(self._quantum, _MOST_SHORT)
        self._short_steps = max((steps for steps in range(1, most + 1) if self._is_cheap(rows, steps)), default=1)
        cheap_seconds = _BUDGET_SHARE * self._inline_seconds
        self._queues = [RequestQueue(self._cost, self.max_batch, self._quantum, cheap_seconds) for _ in range(2)]
        self._short_queue, self._long_queue = self._queues
        self.tracing = tracing
        self._committing: set[asyncio.Task[None]] = set()
        self._scheduled = False  # whether a callback of the event loop will run the next ticks
        self._on_thread = False  # whether a tick is running on the thread

    def submit(
        self,
        slots: Slots,
        x: Array,
        return_all_outputs: bool,
        done: Completion | None = None,
        sink: CompletionSink | None = None,
        keys: Sequence[IdempotencyKey] | None = None,
        before: Sequence[dict[str, Array] | None] | None = None,
        client: str = "",
    ) -> WorkItem:
        """Enqueues a work item of a model that can be stepped.

        Args:
            slots: `[rows]`, the slots to advance, `max_batch` at most. They must not be in another waiting item.
            x: `[rows, time, *features]`, validated.
            return_all_outputs: Return the outputs of all time steps, or only the last one.
            done: Receives the outcome; a future by default.
            sink: Owner of the sessions in the slots, which outlive the request and each advance completely or not at
                all. It is notified as soon as the item ends, even if nobody waits for the result any more.
            keys: By row, the idempotency key; for the sink.
            before: By row, the states before the item; for the sink.
            client: Whose work it is.

        Returns:
            The work item. Its `done` receives `y [rows, time, *outputs]` (time is 1 if only the last output is
            returned); cancelling it drops what has not been computed. Rows that failed have not advanced and are in
            `errors_by_row`; the error of an item's only row is raised by `done`.

        Raises:
            BodyTooLarge, QueueFull: More time steps would wait than the limits.
        """
        rows, steps = x.shape[:2]
        loop = asyncio.get_running_loop()
        done = done or loop.create_future()
        counted = self.bound.enter(client, rows * steps)
        item = WorkItem(x, rows, steps, slots, slots, return_all_outputs, sink, keys, before, done, client, counted)
        if self.tracing is not None:
            item.trace = self.tracing.current()
        (self._short_queue if steps <= self._short_steps else self._long_queue).append(item)
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._coalesce, 0)
        return item

    def borrow(self, count: int) -> Slots:
        """Allocates slots with zero states for the duration of a request; the caller releases them to the arena.

        Raises:
            QueueFull: There are not enough slots.
        """
        slots = self.arena.allocate_many(count)
        if slots is None:
            raise QueueFull(f"too many sequences are in flight for model {self.model.name!r}: try again in a second")
        return slots

    @contextmanager
    def scratch(self, states: Sequence[dict[str, Array] | None]) -> Iterator[Slots]:
        """Allocates a slot for each of these states for the duration of a request.

        Args:
            states: The initial states by name; None for zeros.

        Raises:
            QueueFull: There are not enough slots.
        """
        slots = self.borrow(len(states))
        try:
            for slot, own in zip(slots.tolist(), states, strict=True):
                if own is not None:
                    self.arena.write(slot, own)
            yield slots
        finally:
            self.arena.release(slots)

    @property
    def queued(self) -> int:
        """Waiting time steps, over all rows."""
        return self.bound.waiting

    @property
    def is_idle(self) -> bool:
        """Whether no slot is in use and no work waits or runs."""
        busy = self.arena.in_use or self.queued or self._on_thread or self._committing
        return not busy and self.sequences.is_idle

    def close(self) -> None:
        """Frees the model and the arena of an idle engine, even if the engine is still referenced."""
        self.sequences.close()
        self.model.runtime.close()
        self.arena.close()

    def may_wait(self, steps: int, rows: int = 1) -> bool:
        """Whether new work may take so long that its client may disconnect before it is computed.

        Args:
            steps: Its time steps.
            rows: Its rows.
        """
        waiting = self.bound.waiting + rows * steps
        if waiting <= self.max_batch:
            return False
        seconds = max(self._cost.predict(1, steps), self._cost.predict(self.max_batch, waiting // self.max_batch))
        return seconds > _LONG_WAIT_SECONDS

    def _is_cheap(self, rows: int, steps: int) -> bool:
        return self._cost.predict(rows, steps) <= self._inline_seconds

    def _copy_states(self, slots: Slots) -> Slots:
        copies = self.borrow(len(slots))
        self.arena.copy(slots, copies)
        return copies

    def _coalesce(self, seen: int, iterations: int = 0) -> None:
        """Lets pending requests join the next tick: waits another loop iteration as long as the queues grow."""
        waiting = self._short_queue.waiting + self._long_queue.waiting
        if waiting > seen and waiting < self.max_batch and iterations < _COALESCE_ITERATIONS:
            asyncio.get_running_loop().call_soon(self._coalesce, waiting, iterations + 1)
        else:
            self._run_ready_batches()

    def _run_ready_batches(self) -> None:
        """Dispatches a tick of each queue that is ready, and schedules itself again while there is work."""
        self._scheduled = False
        again = [self._dispatch(queue) for queue in tuple(self._queues)]
        if any(again) and not self._scheduled:
            self._scheduled = True
            # Through the event loop, so that requests that have arrived meanwhile join the next tick.
            asyncio.get_running_loop().call_soon(self._coalesce, 0)

    def _dispatch(self, queue: RequestQueue) -> bool:
        """Runs the next tick of a queue, or starts it on the thread; returns whether another could follow at once."""
        if not queue.waiting:
            return False
        steps, rows = queue.peek()
        cheap = self._is_cheap(rows, steps)
        if not cheap and self._on_thread:
            return False
        tick = queue.schedule(steps)
        for item in tick.cancelled:
            self._complete_one(item)
        if not tick.items:
            return queue.waiting > 0
        try:
            for item in tick.unprotected:
                item.slots = self._copy_states(item.slots)
            x, lengths, slots = tick.inputs()
            states = self.arena.gather(slots)
        except Exception as error:
            self._fail(tick, error)
            return queue.waiting > 0
        if cheap:
            self._postprocess(tick, slots, lengths, states, self._run(x, lengths, states))
            return queue.waiting > 0
        self._on_thread = True
        self._queues.sort(key=lambda other: other is queue)  # if both queues are costly, they alternate

        def finish(run: asyncio.Future[BatchResult]) -> None:
            self._on_thread = False
            self._postprocess(tick, slots, lengths, states, run.result())
            self._run_ready_batches()

        loop = asyncio.get_running_loop()
        loop.run_in_executor(self._executor, self._run, x, lengths, states).add_done_callback(finish)
        return False

    def _run(self, x: Array, lengths: NDArray[np.int32], states: States) -> BatchResult:
        start = self._clock()
        result = run_batch(self.model, x, lengths, states)
        if not result.rerun:
            self._cost.update(x.shape[0], x.shape[1], self._clock() - start)
        return result

    def _postprocess(
        self, tick: Tick, slots: Slots, lengths: NDArray[np.int32], before: States, result: BatchResult
    ) -> None:
        """Stores the next states and completes items; rows that failed or were cancelled keep their old states."""
        y = result.y
        rows = len(lengths)
        steps = sum(tick.lengths) if rows == len(tick.items) else int(lengths.sum())
        self.counts.record_batch(tick.items, rows, result.steps - steps, steps, result.start, result.seconds)
        self.counts.rerun += result.rerun
        if self.tracing is not None:
            self.tracing.record_run(tick.items, result.start, result.seconds)
        try:
            cancelled = any([item.done.cancelled() for item in tick.items])  # noqa: C419  # faster than a generator
            if not (result.failed or cancelled) and is_finite(result):
                self.arena.scatter(slots, result.states)
            else:
                self._scatter_finite_rows(tick, slots, result)
                tick.is_complete = False
        except Exception as error:
            # A cancelled item has given its slots back: they may be another's by now.
            owned = np.repeat([not item.done.cancelled() for item in tick.items], [item.rows for item in tick.items])
            self.arena.restore(slots, before, np.flatnonzero(owned).tolist())
            self._fail(tick, error)
            return
        finally:
            self.arena.done(before)
        if tick.is_complete:
            if self.bound.by_client:
                for item in tick.items:
                    self.bound.leave(item.client, item.rows * item.remaining, item.is_counted)
            else:
                self.bound.waiting -= steps
            self._commit(tick.answers(y), slots, lengths)
            return
        start = 0
        finished: list[Finished] = []
        for item, length in zip(tick.items, tick.lengths, strict=True):
            stop = start + item.rows
            all_y = self._record_progress(item, y[start:stop, :length], length)
            if all_y is not None:
                finished.append((item, all_y))
            start = stop
        if finished:
            self._commit(finished)

    def _commit(self, finished: list[Finished], slots: Slots | None = None, steps: Array | None = None) -> None:
        """Completes finished items, after their results are written to the store.

        Args:
            finished: The items.
            slots: `[rows]`, the slots of all items if they are a whole tick in which nothing failed.
            steps: `[rows]`, by how many time steps those have advanced.
        """
        with_sink = [one for one in finished if one[0].sink is not None]
        sink = with_sink[0][0].sink if with_sink else None
        writing = None
        if sink is not None:
            try:
                writing = sink.commit(self, with_sink)
            except Exception as error:
                self._fail_writes(with_sink, error)
                slots = steps = None
        if writing is None:
            self._complete_all(finished, with_sink, slots, steps)
            return
        task = asyncio.get_running_loop().create_task(
            self._commit_then_complete(writing, finished, with_sink, slots, steps)
        )
        self._committing.add(task)
        task.add_done_callback(self._committing.discard)

    async def _commit_then_complete(
        self,
        writing: Awaitable[None],
        finished: list[Finished],
        with_sink: list[Finished],
        slots: Slots | None,
        steps: Array | None,
    ) -> None:
        start = time.perf_counter()
        try:
            await writing
        except Exception as error:
            self._fail_writes(with_sink, error)
        seconds = time.perf_counter() - start
        self.counts.store.observe(seconds)
        if self.tracing is not None:
            self.tracing.record_commit([item for item, _ in with_sink], start, seconds)
        if any(item.errors_by_row or item.done.cancelled() for item, _ in finished):
            slots = steps = None
        self._complete_all(finished, with_sink, slots, steps)

    def _fail_writes(self, with_sink: list[Finished], error: Exception) -> None:
        log.error("the results of a tick of model %s were not written", self.model.name, exc_info=error)
        for item, _ in with_sink:
            # The model is not to blame, and what the store has of it is not known.
            item.errors_by_row = dict.fromkeys(range(item.rows), StoreUnavailable())

    def _complete_all(
        self, finished: list[Finished], with_sink: list[Finished], slots: Slots | None, steps: Array | None
    ) -> None:
        """Completes committed items: a whole tick at once, as nearly every tick of single steps is."""
        if slots is None or steps is None:
            for one in finished:
                self._complete_one(*one)
            return
        if with_sink:
            sink = with_sink[0][0].sink
            assert sink is not None
            if len(with_sink) == len(finished):
                positions = sink.completed(self, with_sink, slots, steps)
            else:
                rows = np.repeat([one.sink is not None for one, _ in finished], [one.rows for one, _ in finished])
                positions = np.zeros(len(slots), np.int64)
                positions[rows] = sink.completed(self, with_sink, slots[rows], steps[rows])
            start = 0
            for item, y in finished:
                item.final_positions = positions[start : start + item.rows]
                start += item.rows
                item.done.set_result(y)
        else:
            for item, y in finished:
                item.done.set_result(y)

    def _fail(self, tick: Tick, error: Exception) -> None:
        """Fails all items of a tick that could not be run; none has advanced."""
        if not self.model.runtime.has_lost_device(error):
            log.error("a tick of model %s failed", self.model.name, exc_info=error)
        self.counts.failed += 1
        for item in tick.items:
            item.errors_by_row = dict.fromkeys(range(item.rows), run_failed(self.model))
            self._complete_one(item)

    def _scatter_finite_rows(self, tick: Tick, slots: Slots, result: BatchResult) -> None:
        start, good = 0, []
        for item, length in zip(tick.items, tick.lengths, strict=True):
            rows = range(start, start + item.rows)
            start = rows.stop
            if not item.done.cancelled():
                record_row_problems(self.model, item, rows, length, result)
                good += [row for row in rows if row - rows.start not in (item.errors_by_row or ())]
        self.arena.scatter_rows(slots, result.states, good)

    def _record_progress(self, item: WorkItem, y: Array, steps: int) -> Array | None:
        """Records what one tick did for an item; returns its whole y if it is finished."""
        item.steps_done += steps
        item.remaining -= steps
        self.bound.leave(item.client, steps * item.rows, item.is_counted)
        if item.done.cancelled() or (item.errors_by_row and len(item.errors_by_row) == item.rows):
            self._complete_one(item)
            return None
        if item.remaining:
            if item.return_all_outputs:
                if item.outputs is None:
                    item.outputs = self.model.outputs.zeros(item.rows, item.x.shape[1])
                # Copied: y is a part of the whole tick's outputs, and would keep those of all its items.
                item.outputs[:, item.steps_done - steps : item.steps_done] = y
            (self._short_queue if item.x.shape[1] <= self._short_steps else self._long_queue).append(item)
            return None
        if item.slots is not item.target_slots:
            good = [row for row in range(item.rows) if row not in (item.errors_by_row or ())]
            self.arena.copy(item.slots[good], item.target_slots[good])
        if not item.return_all_outputs:
            y = y[:, -1:]
        elif item.outputs is not None:
            item.outputs[:, -steps:] = y
            return item.outputs
        return y

    def _complete_one(self, item: WorkItem, y: Array | None = None) -> None:
        """Completes an item: with y, all rows without an error have advanced; without y, none has."""
        if y is None:
            self.bound.leave(item.client, item.remaining * item.rows, item.is_counted)
        if item.slots is not item.target_slots:
            self.arena.release(item.slots)
        errors = item.errors_by_row or {}
        if item.sink is not None:
            failed = [row for row in range(item.rows) if y is None or row in errors]
            if y is not None and len(failed) < item.rows:
                advanced = item.target_slots[[row for row in range(item.rows) if row not in errors]]
                item.sink.completed(self, [(item, y)], advanced, np.full(len(advanced), item.x.shape[1]))
            if failed:
                item.sink.failed(self, item, item.target_slots[failed])
            item.final_positions = self.arena.position[item.target_slots]
        if item.done.done():
            return
        if errors and item.rows == 1:
            item.done.set_exception(errors[0])
        elif y is not None:
            item.done.set_result(y)
        else:
            steps = item.x.shape[1] if item.return_all_outputs else 1
            item.done.set_result(self.model.outputs.zeros(item.rows, steps))
