"""How a tick is chosen: so that it does most in its time, with little padding, and nobody waits for long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellserve.service.engine.scheduler import Advance, Cost, Lane, Tick


@pytest.fixture(autouse=True)
def loop() -> Iterator[None]:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    loop.close()


def advance(steps: int, rows: int = 1) -> Advance:
    slots: Any = np.arange(rows)
    done: Any = asyncio.get_event_loop_policy().get_event_loop().create_future()
    return Advance(np.zeros((rows, steps, 2), np.float32), rows, steps, slots, slots, True, None, None, None, done)


class Costing:
    """A runtime whose runs cost what is said: `call + steps * (step + rows * row)` seconds."""

    def __init__(self, call: float, step: float, row: float) -> None:
        self.call, self.step, self.row = call, step, row

    def seconds(self, batch: int, time_steps: int) -> float:
        return self.call + time_steps * (self.step + batch * self.row)


def lane(max_batch: int, quantum: int, call: float = 0.0, step: float = 0.0, row: float = 1e-3) -> Lane:
    runtime: Any = Costing(call, step, row)
    return Lane(Cost(runtime, max_batch), max_batch, quantum, cheap_seconds=1.0)


def next_tick(waiting: Lane) -> Tick:
    return waiting.take(waiting.plan()[0])


def lengths(tick: Tick) -> dict[int, int]:
    return {one.x.shape[1]: length for one, length in zip(tick.advances, tick.lengths, strict=True)}


def test_where_rows_are_dear_those_run_together_that_need_little_padding() -> None:
    waiting = lane(max_batch=8, quantum=16, row=1e-2)
    for steps in (3, 100, 16, 15, 17):
        waiting.append(advance(steps))
    ran = lengths(next_tick(waiting))
    assert ran.pop(3) == 3  # it has waited longest, and takes part in any case
    assert ran == {100: 15, 16: 15, 15: 15, 17: 15}


def test_where_a_run_is_dear_each_takes_as_many_time_steps_as_one_can() -> None:
    waiting = lane(max_batch=8, quantum=16, call=1.0, row=1e-6)
    for steps in (16, 6, 5, 4, 3):
        waiting.append(advance(steps))
    ticks = []
    while waiting.waiting:
        tick = next_tick(waiting)
        ticks.append(tick.lengths)
        for one, length in zip(tick.advances, tick.lengths, strict=True):
            one.position += length
            one.remaining -= length
            if one.remaining:
                waiting.append(one)
    assert ticks == [[16], [4, 4, 4, 3], [2], [1]]


def test_long_sequences_share_a_tick_that_is_as_long_as_the_loop_allows() -> None:
    runtime: Any = Costing(1e-5, 1e-6, 2e-6)
    waiting = Lane(Cost(runtime, 256), 256, 32, cheap_seconds=1e-3)
    for _ in range(200):
        waiting.append(advance(100))
    steps, rows = waiting.plan()
    assert steps == 32
    assert 5e-4 < runtime.seconds(rows, steps) <= 1e-3


def test_those_whom_nobody_waits_for_are_dropped() -> None:
    queue = lane(max_batch=8, quantum=16)
    waiting = [advance(4) for _ in range(3)]
    for one in waiting:
        queue.append(one)
    for one in (waiting[0], waiting[2]):
        assert isinstance(one.done, asyncio.Future)
        one.done.cancel()
    tick = next_tick(queue)
    assert tick.advances == [waiting[1]]
    assert tick.dropped == [waiting[0], waiting[2]]


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(1, 4)), min_size=1, max_size=60),
    st.integers(4, 16),
    st.integers(1, 32),
    st.tuples(*(st.sampled_from((1e-6, 1e-4, 1e-2)) for _ in range(3))),
)
def test_all_that_waits_is_run_within_the_bounds_and_nobody_is_passed_over_for_long(
    waiting: list[tuple[int, int]], max_batch: int, quantum: int, costs: tuple[float, float, float]
) -> None:
    queue = lane(max_batch, quantum, *costs)
    for steps, rows in waiting:
        queue.append(advance(steps, rows))
    done: set[int] = set()
    while queue.waiting:
        oldest = min(bucket[0].arrived for bucket in queue._buckets.values())
        tick = next_tick(queue)
        assert oldest in {one.arrived for one in tick.advances}
        assert sum(one.rows for one in tick.advances) <= max_batch
        assert max(tick.lengths) <= quantum
        longest = max(tick.lengths)
        for one, length in zip(tick.advances, tick.lengths, strict=True):
            assert 4 * length >= 3 * longest or one.arrived == oldest
            assert id(one) not in done
            one.position += length
            one.remaining -= length
            if one.remaining:
                queue.append(one)
            else:
                done.add(id(one))
    assert len(done) == len(waiting)
    assert not queue._rows.any()
