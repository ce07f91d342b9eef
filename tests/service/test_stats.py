"""The histogram counts each value in its bucket."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cellserve.service.engine.stats import Histogram

BOUNDS = (0.001, 0.01, 1.0)
VALUES = st.lists(st.one_of(st.floats(0, 10, allow_subnormal=False), st.sampled_from(BOUNDS)), max_size=20)


@given(st.lists(VALUES, max_size=5))
def test_each_value_is_counted_once_however_often_the_histogram_is_read(parts: list[list[float]]) -> None:
    histogram = Histogram(BOUNDS)
    for part in parts:
        histogram.observe_all(part[1:])
        for value in part[:1]:
            histogram.observe(value)
        histogram.read()
    values = [value for part in parts for value in part]
    counts, total = histogram.read()
    wanted = [0] * (len(BOUNDS) + 1)
    for value in values:
        wanted[bisect_left(BOUNDS, value)] += 1
    assert counts == wanted
    assert np.isclose(total, sum(values))


def test_the_buffer_stays_small_while_nobody_reads() -> None:
    histogram = Histogram(BOUNDS)
    for _ in range(10_000):
        histogram.observe(0.5)
    assert histogram.buffered < 5000
    assert histogram.read() == ([0, 0, 10_000, 0], 5000.0)
