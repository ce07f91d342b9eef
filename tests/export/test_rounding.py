"""Networks with jumps that rounding decides are exported; at a jump that it does not decide, a wrong graph is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from cellserve.export.verify.double_precision import in_double
from tests.export.proving import Proof


@keras.saving.register_keras_serializable(package="rounding")
class Jumps(layers.Layer):
    """A cell whose output jumps: in some rows where rounding decides, in all where a product reaches a whole number."""

    state_size = 3
    beside = 0.0  # how far beside a whole number the second is

    def build(self, input_shape: Any) -> None:
        self.kernel = self.add_weight((input_shape[-1], 3), name="kernel")
        self.wide = self.add_weight((input_shape[-1], 33), name="wide")  # kernels add so many in orders of their own
        self.built = True

    def call(self, inputs: Any, states: Any) -> Any:
        product = ops.matmul(inputs, self.kernel)
        sums = ops.sum(ops.matmul(inputs, self.wide), -1, keepdims=True)
        nothing = sums - ops.matmul(inputs, ops.sum(self.wide, -1, keepdims=True))
        chosen = ops.cast(inputs[..., :1] > 2, "float32")  # in float64 too, where it cannot be multiplied with
        jump = chosen * ops.sign(nothing) + ops.floor(3 * product - self.beside)
        state = ops.tanh(product + 0.5 * states[0])
        return state + 0.1 * jump, [state]


def jumps() -> Any:
    keras.utils.set_random_seed(7)
    x = keras.Input((None, 3), name="x")
    return keras.Model(x, layers.RNN(Jumps(), return_sequences=True)(x))


def test_rows_whose_branch_rounding_decides_are_counted_and_not_judged() -> None:
    proof = Proof(jumps())
    for parity in proof.parity.values():
        assert not parity.failed
        assert parity.unjudged > 0
        assert parity.special_unjudged > 0


def test_a_jump_that_is_a_thousandth_beside_its_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from cellserve.export.onnx_graph import tf_trace

    trace = tf_trace.trace_step

    def wrong(*arguments: Any) -> Any:
        monkeypatch.setattr(Jumps, "beside", 1e-3)
        step = trace(*arguments)
        monkeypatch.setattr(Jumps, "beside", 0.0)
        return step

    monkeypatch.setattr("cellserve.export.candidates.candidates.trace_step", wrong)
    for parity in Proof(jumps()).parity.values():
        assert "steps" in {difference.run for difference in parity.failed}


def test_only_results_that_float32_does_not_have_are_rounded_at_random() -> None:
    exact: dict[str, Callable[[Any], Any]] = {
        "add": lambda x: x + 1,
        "divide": lambda x: x / 4,
        "sum": lambda x: ops.sum(x, axis=-1),
        "matmul": lambda x: ops.matmul(x, ops.transpose(x)),
        "tanh": lambda x: ops.tanh(0 * x),
        "sigmoid": lambda x: ops.sigmoid(0 * x),
        "relu": lambda x: ops.relu(x) > 0,
    }
    rounded: dict[str, Callable[[Any], Any]] = {
        "divide": lambda x: x / 3,
        "exp": ops.exp,
        "sum of large terms": lambda x: ops.sum(ops.concatenate([x + 1e30, x - 1e30], axis=-1), axis=-1),
        "matmul": lambda x: ops.matmul(x / 3, ops.transpose(x)),
        "small sigmoid": lambda x: ops.sigmoid(-20 - ops.abs(x)),
        "sign of a zero": lambda x: 1 / ops.relu(0 * x),
    }
    x = np.array([[1, 2, -0.5], [4, 0.25, 8]])
    for function in exact.values():
        assert len(runs_of(function, x)) == 1
    for name, function in rounded.items():
        assert len(runs_of(function, x)) > 1, name
    for run in map(np.frombuffer, runs_of(rounded["divide"], x)):
        np.testing.assert_array_equal(run, run.astype(np.float32))
        np.testing.assert_allclose(run.reshape(x.shape), x / 3, rtol=2**-21)


def runs_of(function: Callable[[Any], Any], x: np.ndarray) -> set[bytes]:
    """The different results of 16 runs in float64 that are rounded at random."""

    def rounded(x: Any) -> Any:
        with in_double(rounded=True):
            return function(x)

    run = tf.function(rounded, autograph=False)
    return {np.asarray(run(tf.constant(x))).tobytes() for _ in range(16)}
