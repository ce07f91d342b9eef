"""What a row of the performance table shows."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from bench.load import Load
from bench.rounds import Comparison, Figure
from bench.table import Row

rates = st.floats(1000, 1e6)


@given(st.lists(st.tuples(rates, rates), min_size=1, max_size=9).filter(lambda pairs: len(pairs) % 2 == 1))
def test_the_ratio_of_a_row_is_the_quotient_of_its_figures_and_the_median_of_the_rounds(
    pairs: list[tuple[float, float]],
) -> None:
    comparison = Comparison([Figure(ours) for ours, _ in pairs], [Figure(theirs) for _, theirs in pairs])
    assert comparison.ratio == sorted(ours / theirs for ours, theirs in pairs)[len(pairs) // 2]
    ours, theirs, ratio = map(float, re.findall(r"[\d.]+", str(Row("m", "b", comparison)).replace(",", ""))[:3])
    written = 0.005 if ratio < 10 else 0.05  # as many decimals as a ratio is written with
    assert abs(ours / theirs - ratio) <= written + ratio * 0.001  # and what the figures were rounded by


def test_a_row_says_whether_its_goal_is_reached() -> None:
    comparison = Comparison([Figure(2.0)], [Figure(1.0)])
    assert "✓" in str(Row("m", "b", comparison, wanted=2))
    assert "✗" in str(Row("m", "b", comparison, wanted=1.9, at_most=True))
    assert "not to be had" in str(Row("m", "not to be had here: why"))


def test_a_figure_is_marked_where_the_generator_may_be_what_was_measured() -> None:
    def figure(busy: float, delayed: float) -> Figure:
        return Figure(1000.0, 1.0, Load(1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0, 0, 0, busy, delayed))

    row = str(Row("m", "b", Comparison([figure(0.5, 0.1)], [figure(0.5, 0.3)])))
    assert "1,000 steps/s | b: 1,000* steps/s" in row
