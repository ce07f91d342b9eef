"""Whatever a graph takes, a run over rows and time steps gives what calling the graph by hand gives."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from cellserve.service.runtime.batch_invariance import CheckPlan, check_batch_invariance, random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import TensorLayout, unpack
from tests import foreign
from tests.kinds import BOTH_WAYS, DEEP, KINDS, LSTM, ONE, SYMBOLS, by_hand

PLAN = CheckPlan(batches=(1, 2, 3, 7), time=4, compositions=3, long=40)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_come_to_what_the_graph_gives_by_hand(kind: str) -> None:
    made, told = KINDS[kind]
    runtime = Runtime(foreign.described(made, told))
    x, states = random_inputs(told, 5, 6, np.random.default_rng(1))
    lengths = np.array([3, 6, 1, 3, 5], np.int32)
    y, following = runtime.run(x, lengths, states)
    for row, length in enumerate(lengths):
        own = [np.take(state, [row], spec.batch_axis) for state, spec in zip(states, told.states, strict=True)]
        outputs, ended = by_hand(made, told, x[row : row + 1], own, length)
        for t in range(length):
            for ours, theirs in zip(unpack(y), outputs[t], strict=True):
                np.testing.assert_allclose(ours[row, t], theirs, rtol=1e-5, atol=1e-6)
        for ours, theirs, spec in zip(following, ended, told.states, strict=True):
            np.testing.assert_allclose(np.take(ours, [row], spec.batch_axis), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_proved_exact(kind: str) -> None:
    made, told = KINDS[kind]
    exactness = check_batch_invariance([Runtime(foreign.described(made, told))], PLAN)
    assert exactness.proved, exactness.why


def test_a_model_that_mixes_rows_is_not_exact_and_alone_it_is() -> None:
    made = foreign.described(foreign.deep(mixed=True), DEEP)
    assert not check_batch_invariance([Runtime(made)], PLAN).proved
    alone = foreign.described(foreign.deep(mixed=True), DEEP.model_copy(update=ONE))
    assert check_batch_invariance([Runtime(alone)], PLAN).proved


def test_a_model_whose_chunks_are_not_the_whole_is_not_exact() -> None:
    assert not check_batch_invariance([Runtime(foreign.described(foreign.lstm(looks_ahead=True), LSTM))], PLAN).proved


@pytest.mark.parametrize("last_only", [False, True])
def test_a_model_that_cannot_be_stepped_runs_whole_sequences(last_only: bool) -> None:
    made = foreign.both_ways(last_only)
    runtime = Runtime(foreign.described(made, BOTH_WAYS))
    x, _ = random_inputs(BOTH_WAYS, 3, 6, np.random.default_rng(2))
    y, _ = runtime.run(x, np.full(3, 6, np.int32), [])
    (theirs,) = ort.InferenceSession(made.SerializeToString()).run(None, {"x": x})
    assert y.shape == (3, 1 if last_only else 6, 8)
    np.testing.assert_allclose(y[:, 0] if last_only else y, theirs, rtol=1e-5, atol=1e-6)
    # A mean over time does not have the same bits in every batch.
    assert last_only or check_batch_invariance([runtime], PLAN).proved


def test_integers_are_drawn_within_their_bounds() -> None:
    x, _ = random_inputs(SYMBOLS, 200, 3, np.random.default_rng(3))
    assert x.dtype == TensorLayout(SYMBOLS.inputs).dtype
    assert set(np.unique(x["symbol"])) == set(range(7))
