"""The cells against the article's equations, written once more in NumPy, and as good citizens of Keras 3."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cellserve.models.tensorflow_import import import_tensorflow

import_tensorflow()

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras import layers  # noqa: E402

from cellserve.models.cells import LSTMCell, RNNCell  # noqa: E402

Array = NDArray[Any]
UNITS, FEATURES, BATCH, STEPS = 6, 4, 3, 20

CELLS: dict[str, Callable[[], Any]] = {
    "elman": lambda: RNNCell(UNITS, bias_initializer="random_normal"),
    "jordan": lambda: RNNCell(UNITS, feedback="output", bias_initializer="random_normal"),
    "lstm": lambda: LSTMCell(UNITS, bias_initializer="random_normal"),
}
every_cell = pytest.mark.parametrize("kind", CELLS)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def weights_of(cell: Any) -> dict[str, Array]:
    return {weight.name: np.asarray(weight, np.float64) for weight in cell.weights}


def numpy_step(kind: str, w: dict[str, Array], x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
    if kind == "lstm":
        h, c = states
        z = np.concatenate([h, x], axis=1)
        f, i = sigmoid(z @ w["W_f"] + w["b_f"]), sigmoid(z @ w["W_i"] + w["b_i"])
        c = f * c + i * np.tanh(z @ w["W_c"] + w["b_c"])
        h = sigmoid(z @ w["W_o"] + w["b_o"]) * np.tanh(c)
        return h, [h, c]
    h = np.tanh(x @ w["W_xh"] + states[0] @ w["W_hh"] + w["b_h"])
    y = h @ w["W_hy"] + w["b_y"]
    return y, [h if kind == "elman" else y]


@every_cell
def test_a_cell_computes_the_equations_of_the_article(kind: str) -> None:
    rng = np.random.default_rng(3)
    cell = CELLS[kind]()
    cell.build((None, FEATURES))
    weights = weights_of(cell)
    states = [rng.normal(size=(BATCH, UNITS)) for _ in cell.state_names]
    ours = [tf.constant(state, tf.float32) for state in states]
    for x in rng.normal(size=(STEPS, BATCH, FEATURES)):
        y, states = numpy_step(kind, weights, x, states)
        our_y, ours = cell(tf.constant(x, tf.float32), ours)
        np.testing.assert_allclose(our_y, y, atol=2e-5)
        for state, true in zip(ours, states, strict=True):
            np.testing.assert_allclose(state, true, atol=2e-5)


def test_elman_and_jordan_differ_only_in_what_is_fed_back() -> None:
    elman, jordan = RNNCell(UNITS), RNNCell(UNITS, feedback="output")
    for cell in (elman, jordan):
        cell.build((None, FEATURES))
    jordan.set_weights(elman.get_weights())
    x, s = np.ones((1, FEATURES), "float32"), np.full((1, UNITS), 0.5, "float32")
    (y, [h]), (jordan_y, [fed]) = elman(x, [s]), jordan(x, [s])
    np.testing.assert_array_equal(y, jordan_y)
    np.testing.assert_array_equal(fed, jordan_y)
    assert not np.allclose(h, y)


@every_cell
def test_gradients_reach_every_weight(kind: str) -> None:
    cell = CELLS[kind]()
    layer = layers.RNN(cell)
    x = tf.random.normal((BATCH, 5, FEATURES), seed=1)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(layer(x)))
    for weight, gradient in zip(cell.trainable_weights, tape.gradient(loss, cell.trainable_weights), strict=True):
        assert gradient is not None and np.abs(gradient).max() > 0, weight.name


@every_cell
def test_every_matrix_begins_with_numbers_of_its_own(kind: str) -> None:
    cell = CELLS[kind]()
    cell.build((None, FEATURES))
    arrays = [weight.numpy().tobytes() for weight in cell.weights]
    assert len(set(arrays)) == len(arrays)


@pytest.mark.long
def test_saved_networks_give_the_same_numbers_in_a_new_process(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(BATCH, STEPS, FEATURES)).astype("float32")
    networks = {
        kind: keras.Sequential([keras.Input((None, FEATURES)), layers.RNN(cell(), return_sequences=True)])
        for kind, cell in CELLS.items()
    }
    for kind, network in networks.items():
        network.save(tmp_path / f"{kind}.keras")
    np.save(tmp_path / "x.npy", x)
    script = (
        "import sys, numpy as np\n"
        "from cellserve.models.tensorflow_import import import_tensorflow\n"
        "import_tensorflow()\n"
        "import keras, models.cells\n"
        "folder, *kinds = sys.argv[1:]\n"
        "for kind in kinds:\n"
        "    network = keras.saving.load_model(folder + f'/{kind}.keras')\n"
        "    np.save(folder + f'/{kind}.npy', network(np.load(folder + '/x.npy')))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), *networks], check=True)
    for kind, network in networks.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{kind}.npy"), network(x))


@every_cell
def test_cells_stack(kind: str) -> None:
    stacked = layers.RNN(layers.StackedRNNCells([CELLS[kind](), CELLS[kind]()]), return_sequences=True)
    x = np.random.default_rng(0).normal(size=(BATCH, STEPS, FEATURES)).astype("float32")
    below, above = (layers.RNN(cell, return_sequences=True) for cell in stacked.cell.cells)
    np.testing.assert_allclose(stacked(x), above(below(x)), atol=1e-6)


@every_cell
def test_a_masked_step_changes_nothing(kind: str) -> None:
    layer = layers.RNN(CELLS[kind]())
    x = np.random.default_rng(0).normal(size=(BATCH, STEPS, FEATURES)).astype("float32")
    mask = np.arange(STEPS) < np.array([[STEPS], [7], [1]])
    masked = np.asarray(layer(x, mask=mask))
    for row, length in enumerate(mask.sum(axis=1)):
        np.testing.assert_allclose(masked[row], layer(x[row : row + 1, :length])[0], atol=1e-6)


@every_cell
def test_mixed_precision_computes_in_half_and_keeps_weights_in_single(kind: str) -> None:
    policy = keras.DTypePolicy("mixed_float16")
    single = CELLS[kind]()
    cell = type(single).from_config({**single.get_config(), "dtype": policy})
    layer = layers.RNN(cell, dtype=policy)
    x = np.random.default_rng(0).normal(size=(BATCH, STEPS, FEATURES)).astype("float32")
    y = layer(x)
    assert y.dtype == "float16"
    assert {weight.dtype for weight in cell.weights} == {"float32"}
    single.build((None, FEATURES))
    single.set_weights(cell.get_weights())
    np.testing.assert_allclose(np.asarray(y, "float32"), layers.RNN(single)(x), atol=0.05)


@every_cell
def test_a_cell_made_from_a_configuration_is_the_same(kind: str) -> None:
    cell = CELLS[kind]()
    assert type(cell).from_config(cell.get_config()).get_config() == cell.get_config()


@pytest.mark.parametrize("cell", [RNNCell, LSTMCell])
@pytest.mark.parametrize("units", [0, -1, 2.5, "8", None, True])
def test_units_that_are_no_positive_integer_are_named(cell: Any, units: Any) -> None:
    with pytest.raises(ValueError, match=rf"{cell.__name__}: units must be a positive integer, got units={units!r}"):
        cell(units)


def test_an_unknown_feedback_is_named() -> None:
    with pytest.raises(ValueError, match=r"feedback must be one of .*, got feedback='both'"):
        RNNCell(4, feedback="both")


@every_cell
@pytest.mark.parametrize("shape", [(None, 5, FEATURES), (FEATURES,), (None, None)])
def test_an_input_that_is_not_batch_by_features_is_named(kind: str, shape: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[batch, features\]"):
        CELLS[kind]().build(shape)
