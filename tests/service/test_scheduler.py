"""The scheduler: ticks have a high throughput and little padding, and no item waits for long."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cellserve.service.engine.scheduler import CostModel, RequestQueue, Tick
from cellserve.service.engine.work import WorkItem


class Done:
    """A completion that can be cancelled."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancelled(self) -> bool:
        return self.is_cancelled


def item(steps: int, rows: int = 1, client: str = "") -> WorkItem:
    slots: Any = np.arange(rows)
    done: Any = Done()
    x = np.zeros((rows, steps, 2), np.float32)
    return WorkItem(x, rows, steps, slots, slots, True, None, None, None, done, client)


class Costing:
    """A runtime whose runs take `call + steps * (step + rows * row)` seconds."""

    def __init__(self, call: float, step: float, row: float) -> None:
        self.call, self.step, self.row = call, step, row

    def seconds(self, batch: int, time_steps: int) -> float:
        return self.call + time_steps * (self.step + batch * self.row)


def queue_of(max_batch: int, quantum: int, call: float = 0.0, step: float = 0.0, row: float = 1e-3) -> RequestQueue:
    return RequestQueue(CostModel(Costing(call, step, row), max_batch, quantum), max_batch, quantum, cheap_seconds=1.0)


def next_tick(queue: RequestQueue) -> Tick:
    return queue.schedule(queue.peek()[0])


def run(tick: Tick) -> list[WorkItem]:
    """Advances the items of a tick as the engine does; returns those with time steps left."""
    for one, length in zip(tick.items, tick.lengths, strict=True):
        one.steps_done += length
        one.remaining -= length
    return [one for one in tick.items if one.remaining]


def lengths(tick: Tick) -> dict[int, int]:
    return {one.x.shape[1]: length for one, length in zip(tick.items, tick.lengths, strict=True)}


def test_if_rows_are_costly_those_that_need_little_padding_run_together() -> None:
    queue = queue_of(max_batch=8, quantum=16, row=1e-2)
    for steps in (3, 100, 16, 15, 17):
        queue.append(item(steps))
    ran = lengths(next_tick(queue))
    assert ran.pop(3) == 3  # it has waited longest, and takes part in any case
    assert ran == {100: 15, 16: 15, 15: 15, 17: 15}


def test_rows_of_like_length_share_a_tick_and_none_is_cut_where_that_costs_much() -> None:
    queue = queue_of(max_batch=8, quantum=16, call=1.0, row=1e-6)
    for steps in (16, 6, 5, 4, 3):
        queue.append(item(steps))
    ticks = []
    while queue.waiting:
        tick = next_tick(queue)
        ticks.append(tick.lengths)
        for one in run(tick):
            queue.append(one)
    assert ticks == [[16], [6, 5], [4, 3]]


def test_long_sequences_share_a_tick_that_is_as_long_as_the_event_loop_allows() -> None:
    runtime = Costing(1e-5, 1e-6, 2e-6)
    queue = RequestQueue(CostModel(runtime, 256, 32), 256, 32, cheap_seconds=1e-3)
    for _ in range(200):
        queue.append(item(100))
    steps, rows = queue.peek()
    assert steps == 32
    assert 5e-4 < runtime.seconds(rows, steps) <= 1e-3


def test_cancelled_items_do_not_take_part() -> None:
    queue = queue_of(max_batch=8, quantum=16)
    items = [item(4) for _ in range(3)]
    for one in items:
        queue.append(one)
    for place in (0, 2):
        items[place].done.is_cancelled = True  # type: ignore[union-attr]
    tick = next_tick(queue)
    assert tick.items == [items[1]]
    assert tick.cancelled == [items[0], items[2]]
    assert queue.waiting == 0


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(1, 4)), min_size=1, max_size=60),
    st.integers(4, 16),
    st.integers(1, 32),
    st.tuples(*(st.sampled_from((1e-6, 1e-4, 1e-2)) for _ in range(3))),
)
def test_all_items_run_within_the_bounds_and_the_oldest_always_takes_part(
    sizes: list[tuple[int, int]], max_batch: int, quantum: int, costs: tuple[float, float, float]
) -> None:
    queue = queue_of(max_batch, quantum, *costs)
    waiting = [item(steps, rows) for steps, rows in sizes]
    for one in waiting:
        queue.append(one)
    finished = 0
    while waiting:
        assert queue.waiting == len(waiting)
        oldest = min(waiting, key=lambda one: one.enqueued_at)
        tick = next_tick(queue)
        assert oldest in tick.items
        assert sum(one.rows for one in tick.items) <= max_batch
        assert max(tick.lengths) <= quantum
        for one, length in zip(tick.items, tick.lengths, strict=True):
            assert 4 * length >= 3 * max(tick.lengths) or one is oldest
            waiting.remove(one)
        unfinished = run(tick)
        finished += len(tick.items) - len(unfinished)
        for one in unfinished:
            queue.append(one)
            waiting.append(one)
    assert finished == len(sizes)
    assert queue.waiting == 0


def clients(tick: Tick) -> list[str]:
    return [one.client for one in tick.items]


def test_while_not_all_fit_clients_take_turns() -> None:
    queue = queue_of(max_batch=8, quantum=16)
    for client in [*("greedy",) * 100, "late", "later"]:
        queue.append(item(4, client=client))
    first = clients(next_tick(queue))
    assert sorted({*first}) == ["greedy", "late", "later"]
    assert len(first) == 8
    assert clients(next_tick(queue)) == ["greedy"] * 8
    queue.append(item(4, client="late"))
    assert "late" in clients(next_tick(queue))


def test_turns_are_of_rows_not_of_items() -> None:
    queue = queue_of(max_batch=8, quantum=16)
    for _ in range(20):
        queue.append(item(4, rows=8, client="wide"))
    for _ in range(20):
        queue.append(item(4, client="narrow"))
    ticks = [clients(next_tick(queue)) for _ in range(4)]
    assert ticks == [["wide"], ["narrow"] * 4, ["wide"], ["narrow"] * 4]


def test_a_client_with_many_lengths_does_not_keep_anothers_item_waiting() -> None:
    queue = queue_of(max_batch=8, quantum=16, row=1e-2)
    for steps in range(3, 17):
        for _ in range(20):
            queue.append(item(steps, client="greedy"))
    queue.append(item(1, client="late"))
    assert "late" in clients(next_tick(queue)) + clients(next_tick(queue))


def test_what_a_client_has_cancelled_takes_none_of_its_turns() -> None:
    queue = queue_of(max_batch=8, quantum=16)
    for _ in range(50):
        queue.append(gone := item(4, client="gone"))
        gone.done.is_cancelled = True  # type: ignore[union-attr]
        queue.append(item(4, client="here"))
    tick = next_tick(queue)
    assert clients(tick) == ["here"] * 8
    assert len(tick.cancelled) == 50
