"""Networks with jumps that rounding decides are exported; at a jump that it does not decide, a wrong graph is found."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from cellserve.export.verify.keras_runs import shaken_weights
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
        jump = ops.where(inputs[..., :1] > 2, ops.sign(nothing), 0) + ops.floor(3 * product - self.beside)
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


def test_shaken_weights_differ_each_time_and_are_put_back() -> None:
    model = jumps()
    before = [weight.numpy().copy() for weight in model.weights]
    seen = [np.concatenate([np.ravel(weight.numpy()) for weight in model.weights]) for _ in shaken_weights(model)]
    assert len({each.tobytes() for each in seen}) > 1
    np.testing.assert_allclose(seen[0], np.concatenate([np.ravel(each) for each in before]), rtol=2e-7)
    for weight, exact in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), exact)
