"""Values are counted where they belong."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cellserve.service.engine.stats import Distribution

BOUNDS = (0.001, 0.01, 1.0)
VALUES = st.lists(st.one_of(st.floats(0, 10), st.sampled_from(BOUNDS)), max_size=20)


@given(st.lists(VALUES, max_size=5))
def test_each_value_is_in_its_bucket_once_however_often_it_is_read(parts: list[list[float]]) -> None:
    distribution = Distribution(BOUNDS)
    for part in parts:
        distribution.note_all(part[1:])
        for value in part[:1]:
            distribution.note(value)
        distribution.read()
    values = [value for part in parts for value in part]
    counts, total = distribution.read()
    wanted = [0] * (len(BOUNDS) + 1)
    for value in values:
        wanted[bisect_left(BOUNDS, value)] += 1
    assert counts == wanted
    assert np.isclose(total, sum(values))


def test_values_do_not_heap_up_while_nobody_reads() -> None:
    distribution = Distribution(BOUNDS)
    for _ in range(10_000):
        distribution.note(0.5)
    assert len(distribution._noted) < 5000
    assert distribution.read() == ([0, 0, 10_000, 0], 5000.0)
