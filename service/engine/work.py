"""Work items: what is submitted to the engine, how its completion is reported, and who owns the sessions in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.state_arena import Slots
from cellserve.service.errors import Problem
from cellserve.service.idempotency import IdempotencyKey

Array = NDArray[Any]


class Completion(Protocol):
    """Receives the outcome of a work item: a future, or a synchronous callback, which must not raise."""

    def done(self) -> bool:
        """Returns whether it is completed or cancelled."""

    def cancelled(self) -> bool:
        """Returns whether it is cancelled: nobody waits for the result."""

    def set_result(self, y: Array) -> None:
        """Completes it."""

    def set_exception(self, error: BaseException) -> None:
        """Completes it with an error."""


@dataclass(slots=True, eq=False)
class WorkItem:
    """Queued or running work: advance the states in some slots by these time steps, each row completely or not at all.

    An item that spans several ticks works on copies of its slots, so that a failure leaves the originals untouched.
    """

    x: Array  # [rows, time, *features]
    rows: int
    remaining: int  # time steps left to run
    slots: Slots  # [rows], the slots that ticks read and write: `target_slots`, or copies of them
    target_slots: Slots  # [rows], the slots that hold the result when the item is complete
    return_all_outputs: bool  # return the outputs of all time steps, or only the last one
    sink: CompletionSink | None  # owner of the sessions in the slots; None for slots that end with the request
    idempotency_keys: Sequence[IdempotencyKey] | None  # by row, for the sink
    states_before: Sequence[dict[str, Array] | None] | None  # by row, for the sink: the states before the item
    done: asyncio.Future[Array] | Completion  # receives y: [rows, time, *outputs], or [rows, 1, *outputs]
    client: str = ""  # whose work it is: clients take turns
    is_counted: bool = False  # whether its time steps are counted for the client
    steps_done: int = 0  # time steps that have run
    enqueued_at: float = field(init=False)  # seconds of time.perf_counter
    trace: Any = field(init=False)  # parent span, if requests are traced
    outputs: Array | None = (
        None  # [rows, time, *outputs], filled by its ticks, if it spans several and all are returned
    )
    errors_by_row: dict[int, Problem] | None = None  # rows that failed; they keep their old state
    final_positions: NDArray[np.int64] = field(init=False)  # [rows], for the sink: each session's position after it

    @property
    def awaited(self) -> asyncio.Future[Array]:
        """The future to await, if the item was submitted without a callback."""
        assert isinstance(self.done, asyncio.Future)
        return self.done


Finished = tuple[WorkItem, Array]  # a work item whose time steps have all run, and its y


class CompletionSink(Protocol):
    """Owner of sessions. It is submitted with each work item, and is notified before the item's `done`.

    All items that change an engine's sessions share one sink: a tick is committed and completed as one batch.
    """

    def commit(self, engine: Any, batch: Sequence[Finished]) -> Awaitable[None] | None:
        """Starts writing the new states of a batch to the store; returns None if there is nothing to wait for.

        Rows that the store refuses are recorded in their item's `errors_by_row`.
        """

    def completed(self, engine: Any, batch: Sequence[Finished], slots: Slots, steps: Array) -> Array:
        """Advances the positions of sessions and unlocks them.

        Args:
            engine: The engine that ran the batch.
            batch: The work items.
            slots: `[rows]`, the slots that advanced.
            steps: `[rows]`, by how many time steps.

        Returns:
            `[rows]`, the new positions.
        """

    def failed(self, engine: Any, item: WorkItem, slots: Slots) -> None:
        """Unlocks sessions that an item has not advanced; the reasons are in its `errors_by_row`."""


class Tracing(Protocol):
    """Records the spans that the engine knows of."""

    def current(self) -> Any:
        """Returns the current span, the parent of spans that are recorded later."""

    def record_run(self, items: Sequence[WorkItem], start: float, seconds: float) -> None:
        """Records a tick's run; `start` is in seconds of `time.perf_counter`."""

    def record_commit(self, items: Sequence[WorkItem], start: float, seconds: float) -> None:
        """Records the write of a tick's results to the store."""
