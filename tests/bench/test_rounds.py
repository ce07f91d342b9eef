"""Rows of the performance table."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from bench.load import Load
from bench.rounds import Comparison, Figure, Rounds
from bench.table import Row

rates = st.floats(1000, 1e6)


@given(st.lists(st.tuples(rates, rates), min_size=1, max_size=9).filter(lambda pairs: len(pairs) % 2 == 1))
def test_a_row_shows_the_median_ratio_and_the_figures_of_that_round(
    pairs: list[tuple[float, float]],
) -> None:
    comparison = Comparison([Figure(ours) for ours, _ in pairs], [Figure(theirs) for _, theirs in pairs])
    assert comparison.ratio == sorted(ours / theirs for ours, theirs in pairs)[len(pairs) // 2]
    ours, theirs, ratio = map(float, re.findall(r"[\d.]+", str(Row("m", "b", comparison)).replace(",", ""))[:3])
    written = 0.005 if ratio < 10 else 0.05  # rounding of the ratio
    assert abs(ours / theirs - ratio) <= written + ratio * 0.001  # rounding of the figures


def test_a_row_shows_whether_its_goal_is_met() -> None:
    comparison = Comparison([Figure(2.0)], [Figure(1.0)])
    assert "✓" in str(Row("m", "b", comparison, wanted=2))
    assert "✗" in str(Row("m", "b", comparison, wanted=1.9, at_most=True))
    assert "not available" in str(Row("m", "not available here: why"))


def test_a_figure_is_marked_if_the_load_generator_may_have_been_the_bottleneck() -> None:
    def figure(busy: float, delayed: float) -> Figure:
        return Figure(1000.0, 1.0, Load(1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0, 0, 0, busy, delayed))

    row = str(Row("m", "b", Comparison([figure(0.5, 0.1)], [figure(0.5, 0.3)])))
    assert "1,000 steps/s | b: 1,000* steps/s" in row


def test_cpu_time_beyond_that_of_another_is_compared_round_by_round() -> None:
    rounds = Rounds()
    for ours, theirs in ((100.0, 60.0), (90.0, 60.0), (200.0, 150.0)):
        rounds.add("redis", "ours", Figure(1, ours))
        rounds.add("redis", "theirs", Figure(1, theirs))
    beyond = rounds.beyond("redis", "ours", "theirs", 45)
    assert [figure.value for figure in beyond.ours] == [40, 30, 50]
    assert beyond.ratio == 40 / 45
    assert Row("CPU", "wanted", beyond, "µs a step", 1, at_most=True).met
