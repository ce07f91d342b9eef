"""Drawing a symbol: a pure function of the output, the seed and the position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellserve.service.errors import ModelFailed
from cellserve.service.sessions.sampling import Sampling, sample, uniform
from tests.service.strategies import SEEDS

WEIGHTS = st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=1, max_size=40).filter(any)
POSITIONS = st.integers(0, 2**63 - 1)
SAMPLINGS = st.builds(
    Sampling, temperature=st.sampled_from([0, 1e-300, 1e-3, 0.7, 1, 3, 1e300]),
    top_k=st.none() | st.integers(1, 50), seed=SEEDS,
)  # fmt: skip


def test_the_shares_are_those_of_philox_with_this_key_and_counter() -> None:
    drawn = [uniform(seed, position) for seed, position in ((0, 0), (0, 1), (7, 12), (2**63 - 1, 2**62))]
    # Written down once: another version of NumPy must give the same.
    assert drawn == [
        0.011546754286331562,
        0.5023796042735054,
        0.04774028854427814,
        0.8770849598780815,
    ]


@given(WEIGHTS, SAMPLINGS, POSITIONS)
def test_a_symbol_is_drawn_that_can_be_among_the_most_probable_and_always_the_same(
    weights: list[float], sampling: Sampling, position: int
) -> None:
    output = np.array(weights, np.float32)
    place = sample(output, False, sampling, position)
    assert output[place] > 0
    assert np.count_nonzero(output > output[place]) < (sampling.top_k or len(output))
    if sampling.temperature == 0 or sampling.top_k == 1:
        assert place == output.argmax()
    assert sample(output.copy(), False, sampling, position) == place


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=1, max_size=40),
    SAMPLINGS,
    POSITIONS,
)
def test_a_symbol_drawn_from_logits_is_one_of_the_top_k_and_always_the_same(
    logits: list[float], sampling: Sampling, position: int
) -> None:
    output = np.array(logits, np.float32)
    place = sample(output, True, sampling, position)
    assert np.count_nonzero(output > output[place]) < (sampling.top_k or len(output))
    assert sample(output.copy(), True, sampling, position) == place


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_symbols_come_as_often_as_they_are_probable(temperature: float) -> None:
    output = np.array([0.5, 0.0, 0.3, 0.2], np.float32)
    wanted = output ** (1 / temperature) / (output ** (1 / temperature)).sum()
    for logits in (False, True):
        with np.errstate(divide="ignore"):
            given = np.maximum(np.log(output), -1e30).astype(np.float32) if logits else output
        drawn = [sample(given, logits, Sampling(temperature, None, 5), position) for position in range(4000)]
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, wanted, atol=0.03)


def test_of_equally_probable_symbols_the_first_ones_are_the_most_probable() -> None:
    output = np.full(5, 0.2, np.float32)
    assert {sample(output, False, Sampling(1, 2, 0), position) for position in range(100)} == {0, 1}
    assert sample(output, False, Sampling(0), 3) == 0


def test_of_an_output_that_is_no_distribution_nothing_is_drawn() -> None:
    with pytest.raises(ModelFailed, match="all zero"):
        sample(np.zeros(3, np.float32), False, Sampling(), 0)
