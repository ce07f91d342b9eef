"""Networks that guard against what is not finite: a select gives the branch taken, whatever the other one is."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from tests.export.proving import Proof

import keras  # isort: skip  after TensorFlow has been imported quietly
from keras import layers, ops  # isort: skip


@keras.saving.register_keras_serializable("tests")
class GuardedCell(layers.Layer):
    """A cell with a guard of its own, around a quotient by its input, and one around its state."""

    state_size = output_size = 2

    def get_initial_state(self, batch_size: int | None = None) -> list[Any]:
        return [ops.zeros((batch_size, 2))]

    def call(self, inputs: Any, states: Any) -> Any:
        quotient = ops.where(ops.equal(inputs, 0), states[0], 1 / inputs)
        root = ops.where(states[0] < 0, ops.zeros_like(inputs), ops.sqrt(states[0]))
        state = ops.tanh(quotient + root)
        return state, [state]


def in_front(function: Any) -> Any:
    x = keras.Input((None, 2), name="x")
    return keras.Model(x, layers.Dense(1)(layers.LSTM(8, return_sequences=True)(function(x))))


NETWORKS = {
    "guarded_reciprocal": lambda: in_front(lambda x: ops.where(ops.isfinite(1 / x), 1 / x, ops.zeros_like(x))),
    "nan_to_num": lambda: in_front(lambda x: ops.nan_to_num(1 / x, nan=0.0, posinf=0.0, neginf=0.0)),
    "guarded_log": lambda: in_front(lambda x: ops.where(ops.equal(x, 0), ops.zeros_like(x), ops.log(ops.abs(x)))),
    "guarded_cell": lambda: keras.Sequential(
        [keras.Input((None, 2), name="x"), layers.RNN(GuardedCell(), return_sequences=True)]
    ),
    # Selects among integers and among truth values, whose types ONNX Runtime's `Where` does not all know.
    "integers": lambda: in_front(
        lambda x: ops.cast(ops.where(x > 0, ops.cast(x, "int32"), ops.full_like(x, -3, dtype="int32")), "float32")
    ),
    "truth_values": lambda: in_front(lambda x: ops.cast(ops.where(x > 0, x > 1, x < -1), "float32")),
}
X = np.array([[[2, 0], [1, 1], [0.5, 1], [0, 0], [-0.0, -3], [1e-30, 1e30], [-1e-30, 7]]], np.float32)


@functools.cache
def proof(name: str) -> Proof:
    keras.utils.set_random_seed(8)
    return Proof(NETWORKS[name]())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_guarded_network_gives_keras_numbers_where_its_guard_is_needed_at_once_and_stepped(name: str) -> None:
    made, time = proof(name), X.shape[1]
    true = made.keras.predict(X, verbose=0)
    assert np.isfinite(true).all()
    for runtime in made.forms.values():
        if runtime.signature.lengths:
            whole, _ = runtime.run(X, np.array([time], np.int32), runtime.zeros(1))
            np.testing.assert_allclose(whole, true, rtol=1e-5, atol=1e-5)
        states = runtime.zeros(1)
        for t in range(time):
            y, states = runtime.run(np.ascontiguousarray(X[:, t : t + 1]), np.ones(1, np.int32), states)
            np.testing.assert_allclose(y[:, 0], true[:, t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_guarded_network_is_stepped_like_any_other(name: str) -> None:
    assert proof(name).signature.predict_only is None
    proof(name).check()
