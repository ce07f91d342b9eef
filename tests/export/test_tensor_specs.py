"""The bounds of integer inputs, as the layers and operations that read them set them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tests.networks  # noqa: F401  imports TensorFlow quietly

import keras  # isort: skip
from keras import layers, ops  # isort: skip

from cellserve.export.keras_model.tensor_specs import input_specs
from tests.export.proving import Proof

TABLE = np.arange(48, dtype=np.float32).reshape(24, 2)
READERS: dict[str, tuple[Callable[[Any], Any], tuple[int, int] | None]] = {
    "take": (lambda x: ops.take(TABLE, x, axis=0), (0, 23)),
    "take of the last axis": (lambda x: ops.take(TABLE, x, axis=-1), (0, 1)),
    "take of all entries": (lambda x: ops.take(TABLE, x), (0, 47)),
    "take_along_axis": (lambda x: ops.take_along_axis(ops.ones((1, 7)), x, axis=1), (0, 6)),
    "one_hot": (lambda x: ops.one_hot(x, 7), (0, 6)),
    "embedding": (lambda x: layers.Embedding(5, 2)(x), (0, 4)),
    "behind a cast and a reshape": (lambda x: ops.take(TABLE, ops.expand_dims(ops.cast(x, "int64"), -1), 0), (0, 23)),
    "two readers": (lambda x: ops.concatenate([ops.take(TABLE, x, axis=0), ops.one_hot(x, 7)], -1), (0, 6)),
    "behind arithmetic": (lambda x: ops.take(TABLE, ops.clip(x, 0, 23), axis=0), None),
}


@pytest.mark.parametrize("name", READERS)
def test_an_integer_input_has_the_bounds_of_what_reads_it(name: str) -> None:
    reader, bounds = READERS[name]
    x = keras.Input((None,), dtype="int32")
    assert input_specs(keras.Model(x, reader(x)))[0].bounds == bounds


def test_an_index_is_taken_as_keras_takes_it_and_one_out_of_range_is_an_error_of_the_run() -> None:
    x = keras.Input((None,), dtype="int32", name="hour")
    y = layers.LSTM(4, return_sequences=True)(ops.take(TABLE, ops.add(x, 0), axis=0))
    made = Proof(keras.Model(x, y))
    runtime = next(iter(made.forms.values()))
    for index in (0, 23, -1, -24):
        step = np.full((1, 1), index, np.int32)
        mine, _ = runtime.run(step, np.ones(1, np.int32), runtime.zeros(1))
        np.testing.assert_allclose(mine, made.keras.predict(step, verbose=0), rtol=1e-6, atol=1e-6)
    for index in (24, -25):
        with pytest.raises(Exception, match="out of data bounds"):
            runtime.run(np.full((1, 1), index, np.int32), np.ones(1, np.int32), runtime.zeros(1))
