"""How a tick is chosen: in order of arrival, with little padding, within its bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.ticks import Advance, Lane


@pytest.fixture(autouse=True)
def loop() -> Iterator[None]:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    loop.close()


def advance(steps: int, rows: int = 1) -> Advance:
    slots: Any = np.arange(rows)
    done: Any = asyncio.get_event_loop_policy().get_event_loop().create_future()
    return Advance(np.zeros((rows, steps, 2), np.float32), rows, steps, slots, slots, True, False, done)


def test_the_one_that_waited_longest_sets_the_steps_and_those_alike_join() -> None:
    lane = Lane(max_batch=8, quantum=16)
    waiting = [advance(steps) for steps in (12, 3, 100, 9, 8, 12, 16, 17)]
    for one in waiting:
        lane.append(one)
    tick = lane.take()
    assert {one.x.shape[1]: length for one, length in zip(tick.advances, tick.lengths, strict=True)} == {
        12: 12, 100: 12, 9: 9, 16: 12, 17: 12,
    }  # fmt: skip
    assert [one.x.shape[1] for one in lane.take().advances] == [3]
    assert [one.x.shape[1] for one in lane.take().advances] == [8]
    assert lane.waiting == 0


def test_padding_is_allowed_where_it_costs_less_than_a_tick() -> None:
    lane = Lane(max_batch=8, quantum=16, padding=10)
    for steps in (16, 6, 5):
        lane.append(advance(steps))
    assert sorted(lane.take().lengths) == [6, 16]
    assert lane.take().lengths == [5]


def test_those_whom_nobody_waits_for_are_dropped() -> None:
    lane = Lane(max_batch=8, quantum=16)
    waiting = [advance(4) for _ in range(3)]
    for one in waiting:
        lane.append(one)
    waiting[0].done.cancel()
    waiting[2].done.cancel()
    tick = lane.take()
    assert tick.advances == [waiting[1]]
    assert tick.dropped == [waiting[0], waiting[2]]


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(1, 4)), min_size=1, max_size=60),
    st.integers(4, 16),
    st.integers(1, 32),
    st.integers(0, 12),
)
def test_all_that_waits_is_run_within_the_bounds_and_nobody_is_passed_over_for_long(
    waiting: list[tuple[int, int]], max_batch: int, quantum: int, padding: int
) -> None:
    lane = Lane(max_batch, quantum, padding)
    for steps, rows in waiting:
        lane.append(advance(steps, rows))
    done: set[int] = set()
    while lane.waiting:
        oldest = min(bucket[0].number for bucket in lane._buckets.values())
        tick = lane.take()
        assert oldest in {one.number for one in tick.advances}
        assert sum(one.rows for one in tick.advances) <= max_batch
        assert max(tick.lengths) <= quantum
        longest = max(tick.lengths)
        for one, length in zip(tick.advances, tick.lengths, strict=True):
            assert length == longest or 4 * length >= 3 * longest or longest - length <= padding
            assert id(one) not in done
            one.position += length
            one.remaining -= length
            if one.remaining:
                lane.append(one)
            else:
                done.add(id(one))
    assert len(done) == len(waiting)
