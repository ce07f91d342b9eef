"""The model of replicas and shards, and the arithmetic of docs/explanation/scale.md."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.scale.costs import COSTS
from bench.scale.model import MAX_BATCH, Cluster, Cost, simulate
from bench.scale.real import line
from bench.scale.sizes import SIZES, size, table
from tests.helpers import ROOT

ONE = Cluster(1, 1, replica=Cost(30, 50), shard=Cost(5, 20), wire_us=100)
MEMORY = Cluster(1, 0, replica=Cost(0, 40), shard=Cost(0, 0), wire_us=0, batch=1)


def test_a_step_alone_takes_what_its_parts_take() -> None:
    alone = simulate(ONE, 10, steps=2000)
    assert alone.p50 == pytest.approx((30 + 50 + 100 + 5 + 20 + 100) / 1e6)
    assert simulate(replace(ONE, shards=0), 10, steps=2000).p50 == pytest.approx((30 + 50) / 1e6)
    with_load = simulate(replace(ONE, load=Cost(6, 8)), 10, steps=2000)
    assert with_load.p50 == pytest.approx(alone.p50 + (6 + 8 + 100 + 100) / 1e6)


@pytest.mark.parametrize("use", [0.3, 0.8])
def test_known_queues_wait_as_long_as_their_formulas_say(use: float) -> None:
    # Pollaczek and Khinchine: one server of a constant time, random arrivals (M/D/1).
    assert simulate(MEMORY, use / 40e-6, 150_000).mean * 1e6 == pytest.approx(40 + 40 * use / (2 - 2 * use), rel=0.05)
    # A core that many processes share equally (M/D/1-PS); so many, that none has two steps at once.
    shared = replace(MEMORY, replicas=2000, cores=1)
    assert simulate(shared, use / 40e-6, 150_000).mean * 1e6 == pytest.approx(40 / (1 - use), rel=0.05)


def test_ticks_that_follow_each_other_take_half_of_one_to_wait_for_and_one_to_run() -> None:
    ticks = replace(MEMORY, replica=Cost(1000, 0), batch=10**6)
    assert simulate(ticks, 50 / 1000e-6).mean * 1e6 == pytest.approx(1500, rel=0.02)


def test_beyond_what_it_can_do_the_queue_grows_and_below_it_does_not() -> None:
    for cluster in (ONE, replace(ONE, replicas=8), replace(ONE, shards=0)):
        low, high = (simulate(cluster, share * cluster.capacity, steps=20_000) for share in (0.8, 1.3))
        longer = simulate(cluster, 1.3 * cluster.capacity, steps=40_000)
        assert low.p99 < 0.02
        assert 1.7 < longer.p99 / high.p99 < 2.3


def test_ticks_grow_with_the_load_up_to_a_batch() -> None:
    rows = [simulate(ONE, share * ONE.capacity, steps=20_000).rows for share in (0.05, 0.5, 0.9, 2)]
    assert rows == sorted(rows)
    assert 1 <= rows[0] < 1.2 and rows[3] == pytest.approx(MAX_BATCH, rel=0.2)


def test_the_shards_are_the_limit_where_they_are_fewer() -> None:
    many = replace(ONE, replicas=100)
    assert many.capacity == 1e6 / (20 + 5 / MAX_BATCH)
    assert replace(many, shards=4).capacity == 4e6 / (20 + 4 * 5 / MAX_BATCH)
    assert ONE.capacity < 1e6 / 50


def test_more_sessions_need_more_memory_and_more_steps_more_cores() -> None:
    small, sessions, steps = size(10**6, 10**6), size(10**9, 10**6), size(10**6, 10**7)
    assert sessions.shards_for_memory > small.shards_for_memory and sessions.replicas == small.replicas
    assert steps.replicas == pytest.approx(10 * small.replicas, rel=0.1)
    assert size(10**4, 10**4).one_machine and not small.one_machine
    assert size(10**6, 10**6, replace(COSTS, redis_us=2 * COSTS.redis_us)).shards > small.shards


def test_the_page_has_the_table_as_it_is_computed() -> None:
    page = (ROOT / "docs" / "explanation" / "scale.md").read_text()
    assert "\n".join(table()) in page
    assert len(list(table())) == len(SIZES) + 2


def test_the_cost_of_a_tick_and_of_a_step_are_found_from_loads_of_both_kinds() -> None:
    ticks, steps = (10, 700, 500), (640, 1000, 900)
    seconds = [1e-6 * (200 * some + 40 * many) for some, many in zip(ticks, steps, strict=True)]
    assert line(seconds, ticks, steps) == pytest.approx((200, 40))
