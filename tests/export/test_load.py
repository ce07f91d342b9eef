"""What is loaded is changed to be served, and computes what was saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cellserve.models.tensorflow_import import import_tensorflow

import_tensorflow()

import keras  # noqa: E402
from keras import layers  # noqa: E402

from cellserve.export.keras_model.load import load, with_dtype, with_open_shapes  # noqa: E402

X = np.random.default_rng(0).normal(5, 3, (2, 6, 4)).astype(np.float32)


def normalised(batch: int | None = None) -> keras.Model:
    """A network whose normalisation has seen data; its layer keeps copies of what it has learned beside its weights."""
    normalise = layers.Normalization()
    normalise.adapt(np.random.default_rng(1).normal(5, 3, (100, 4)).astype(np.float32))
    inner = keras.Sequential([keras.Input((None, 4)), normalise])
    return keras.Sequential([keras.Input((None, 4), batch_size=batch), inner, layers.LSTM(8, return_sequences=True)])


def test_a_copy_in_float64_normalises_as_the_network_does() -> None:
    model = normalised()
    copy = with_dtype(model, "float64")
    np.testing.assert_allclose(np.asarray(copy(X.astype(np.float64))), np.asarray(model(X)), atol=1e-5)


def test_a_network_of_one_batch_size_normalises_the_same_once_it_takes_any() -> None:
    model = normalised(batch=len(X))
    np.testing.assert_allclose(np.asarray(with_open_shapes(model)(X)), np.asarray(model(X)), atol=1e-6)


def test_a_layer_of_integers_keeps_its_type(tmp_path: Path) -> None:
    ids = keras.Input((None,), dtype="int32")
    model = keras.Model(ids, layers.LSTM(4)(layers.Embedding(9, 3)(layers.Hashing(9)(ids))))
    model.save(tmp_path / "hashed.keras")
    for copy in (load(tmp_path / "hashed.keras"), with_dtype(model, "float64")):
        assert copy.layers[1].compute_dtype == "int64"
