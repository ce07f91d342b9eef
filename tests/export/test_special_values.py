"""Networks whose code holds for ordinary numbers only where it is not converted with care: served as Keras has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from cellserve.export.onnx_graph import operators
from cellserve.export.verify.special_values import special_numbers
from tests.export.proving import Proof


def before_lstm(function: Callable[[Any], Any], recurrent: Any = layers.LSTM) -> Any:
    x = keras.Input((None, 2), name="x")
    return keras.Model(x, layers.Dense(1)(recurrent(8, return_sequences=True)(function(x))))


# Keras is not finite for some inputs that a client may send.
NOT_FINITE_AT = {
    "sqrt": (ops.sqrt, [-1.0, 2.0]),
    "log": (ops.log, [-1.0, 2.0]),
    "reciprocal": (lambda x: 1 / x - 1 / ops.abs(x), [0.0, 1.0]),
    "overflow": (lambda x: x * 1e4, [1e36, -1e36]),
}


@pytest.mark.parametrize("recurrent", [layers.LSTM, layers.GRU, layers.SimpleRNN])
@pytest.mark.parametrize("name", NOT_FINITE_AT)
def test_where_keras_is_not_finite_neither_is_the_next_state_in_any_form(name: str, recurrent: Any) -> None:
    function, x = NOT_FINITE_AT[name]
    proof = Proof(before_lstm(function, recurrent))
    for runtime in proof.forms.values():
        rows = np.array([[x, [0.1, 0.2]], [[0.5, 0.25], [0.1, 0.2]], [[0.5, 0.25], x]], np.float32)
        y, states = runtime.run(rows, np.full(3, 2, np.int32), runtime.zeros(3))
        finite = np.logical_and.reduce([np.isfinite(each).reshape(3, -1).all(axis=1) for each in (y, *states)])
        assert finite.tolist() == [False, True, False]


def backwards(recurrent: Any) -> Any:
    return recurrent(8, return_sequences=True, go_backwards=True)


def both_ways(recurrent: Any) -> Any:
    return layers.Bidirectional(recurrent(8, return_sequences=True))


@pytest.mark.parametrize("read", [backwards, pytest.param(both_ways, marks=pytest.mark.long)])
@pytest.mark.parametrize("recurrent", [layers.LSTM, pytest.param(layers.GRU, marks=pytest.mark.long)])
def test_where_keras_is_not_finite_in_whole_sequences_no_form_is(recurrent: Any, read: Callable[[Any], Any]) -> None:
    x = keras.Input((None, 2), name="x")
    masked = layers.Masking(9.0)(x)
    model = keras.Model(x, layers.Dense(1)(read(recurrent)(ops.sqrt(masked))))
    rows = np.array([[[1, 2], [-1, 1], [3, 4]], [[1, 2], [9, 9], [3, 4]], [[1, 2], [5, 6], [0, 1]]], np.float32)
    finite = np.isfinite(model.predict(rows, verbose=0))
    proof = Proof(model)
    assert len(proof.forms) == 2
    for name, runtime in proof.forms.items():
        y, _ = runtime.run(rows, np.full(3, 3, np.int32), [])
        np.testing.assert_array_equal(np.isfinite(y), finite)
        assert not proof.parity[name].failed
    assert not finite.all()


def test_a_form_of_whole_sequences_that_is_wrong_on_special_numbers_alone_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cellserve.export.onnx_graph.operators.is_bounded", lambda graph, name: True)
    x = keras.Input((None, 2), name="x")
    proof = Proof(keras.Model(x, both_ways(layers.LSTM)(ops.sqrt(ops.abs(x)) / x)))
    runs = {name: {difference.run for difference in parity.failed} for name, parity in proof.parity.items()}
    assert runs == {"operator of LSTMCell": {"special"}, "Scan": set()}


def test_a_padded_step_that_is_not_finite_harms_nothing() -> None:
    proof = Proof(before_lstm(ops.sqrt))
    for runtime in proof.forms.values():
        x = np.array([[[1, 2], [-1, -1]], [[1, 2], [3, 4]]], np.float32)
        _, states = runtime.run(x, np.array([1, 2], np.int32), runtime.zeros(2))
        assert all(np.isfinite(state).all() for state in states)


def test_a_branch_at_a_constant_is_tried_at_it_and_beside_it() -> None:
    proof = Proof(before_lstm(lambda x: ops.where(x > 60.25, -x, ops.tanh(x))))
    numbers = special_numbers(np.array([60.25], np.float32))
    assert {60.25, float(np.nextafter(np.float32(60.25), np.float32(61)))} <= set(numbers.tolist())
    assert all(not parity.failed for parity in proof.parity.values())


def test_a_conversion_that_is_wrong_on_special_numbers_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from cellserve.export.onnx_graph import tf_trace

    trace = tf_trace.trace_step

    def wrong(network: Any, *more: Any) -> Any:
        step = trace(network, *more)
        for node in step.nodes:
            if node.op_type == "Greater":
                node.op_type = "GreaterOrEqual"
        return step

    monkeypatch.setattr("cellserve.export.candidates.candidates.trace_step", wrong)
    proof = Proof(before_lstm(lambda x: ops.where(x > 60.25, -x, ops.tanh(x))))
    for parity in proof.parity.values():
        assert {difference.run for difference in parity.failed} == {"special"}


@keras.saving.register_keras_serializable(package="special")
class GateInState(layers.Layer):
    """A cell that keeps a gate, and divides by it a step later."""

    state_size = 3

    def call(self, inputs: Any, states: Any) -> Any:
        return ops.tanh(ops.nan_to_num(1e-12 / states[0], posinf=-1.0)), [ops.sigmoid(inputs)]


def test_a_gate_of_nearly_zero_has_its_digits_where_the_next_step_divides_by_it() -> None:
    x = keras.Input((None, 3), name="x")
    model = keras.Model(x, layers.RNN(GateInState(), return_sequences=True)(x))
    rows = np.full((1, 3, 3), [-20, -30, 0.5], np.float32)
    for name, runtime in (proof := Proof(model)).forms.items():
        y, _ = runtime.run(rows, np.full(1, 3, np.int32), runtime.zeros(1))
        np.testing.assert_allclose(y[:, 1:], model.predict(rows, verbose=0)[:, 1:], rtol=1e-5)
        assert not proof.parity[name].failed


def untrained_lstm(seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    x = keras.Input((None, 5), name="x")
    return keras.Model(x, layers.LSTM(128, return_sequences=True)(x))


def test_what_a_gate_of_nearly_zero_lets_through_of_a_large_state_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellserve.export.verify.special_values._STATE_NUMBERS", (100, -3000, 3e4, 5e5))
    proof = Proof(untrained_lstm(6))
    worst = max(difference.share for parity in proof.parity.values() for difference in parity.differences)
    assert worst <= 0.5  # not merely this network's good luck


@pytest.mark.parametrize("wrong", ["a gate is off by 1e-4", "no bias", "gates in another order"])
def test_a_wrong_recurrent_operator_is_found_among_large_states_too(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = operators.recurrent_operator

    def wrong_operator(graph: Any, name: str, x: str, lengths: str, states: Any, weights: Any) -> Any:
        kernel, recurrent, bias = (np.array(each) for each in dataclasses.astuple(weights)[:3])
        if wrong == "gates in another order":
            kernel, recurrent = (np.roll(each, each.shape[1] // 4, axis=1) for each in (kernel, recurrent))
        bias = {"a gate is off by 1e-4": bias + np.float32(4e-4), "no bias": bias * 0}.get(wrong, bias)
        return right(graph, name, x, lengths, states, operators.Weights(kernel, recurrent, bias))

    monkeypatch.setattr(operators, "recurrent_operator", wrong_operator)
    parity = Proof(untrained_lstm(6)).parity["operator of LSTMCell"]
    assert {"steps", "special"} <= {difference.run for difference in parity.failed}
