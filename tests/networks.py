"""Small networks that the tests export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cellserve.models.tensorflow_import import import_tensorflow

import_tensorflow()

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402
from rich.console import Console  # noqa: E402

from cellserve.export.exporter import export  # noqa: E402
from cellserve.export.publish.request import ExportRequest  # noqa: E402
from cellserve.models.cells import LSTMCell, RNNCell  # noqa: E402
from tests.export.unmeasured import unmeasured  # noqa: E402
from tests.helpers import FEATURES, OUTPUTS  # noqa: E402


@keras.saving.register_keras_serializable(package="tests")
class DecayingCell(keras.layers.Layer):
    """A cell that is no LSTM and resembles one: its carried state decays, and its gates are in another order."""

    def __init__(self, units: int, decay: float = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units, self.decay = units, decay
        self.state_size = [units, units]

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.kernel = self.add_weight((input_shape[-1], 4 * self.units), name="kernel")
        self.recurrent = self.add_weight((self.units, 4 * self.units), name="recurrent")
        self.built = True

    def call(self, inputs: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        h, c = states
        o, f, i, candidate = ops.split(ops.matmul(inputs, self.kernel) + ops.matmul(h, self.recurrent), 4, axis=-1)
        c = self.decay * ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(candidate)
        h = ops.sigmoid(o) * ops.tanh(c)
        return h, [h, c]

    def get_initial_state(self, batch_size: int | None = None) -> list[Any]:
        return [ops.zeros((batch_size, self.units)) for _ in range(2)]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units, "decay": self.decay}


def network(cell: Any, features: int = FEATURES, outputs: int = OUTPUTS, return_sequences: bool = True) -> Any:
    """A recurrent layer over a cell, and a Dense layer over its outputs."""
    return keras.Sequential(
        [
            keras.Input((None, features)),
            layers.RNN(cell, return_sequences=return_sequences, name="recurrent"),
            layers.Dense(outputs, bias_initializer="random_normal", name="out"),
        ]
    )


def export_small_networks(folder: Path) -> Path:
    """Exports `lstm`, `rnn` and `decaying` into a repository; gives its folder."""
    keras.utils.set_random_seed(7)
    cells = {
        "lstm": LSTMCell(16, bias_initializer="random_normal"),
        "rnn": RNNCell(16, bias_initializer="random_normal"),
        "decaying": DecayingCell(8),
    }
    for name, cell in cells.items():
        path = folder / f"{name}.keras"
        network(cell).save(path)
        with unmeasured(without_step=["lstm"]):  # a model of two graphs, and one of one
            export(ExportRequest(path, name, folder / "artifacts"), Console(quiet=True))
    return folder / "artifacts"


def several_ends() -> Any:
    """Two inputs, one of integers; two outputs, one of them the last; a nested model, called twice; a shared layer."""
    numbers = keras.Input((None, 3), name="numbers")
    ids = keras.Input((None,), name="ids", dtype="int32")
    inner_x = keras.Input((None, 4))
    inner = keras.Model(inner_x, layers.Add()([inner_x, layers.LSTM(4, return_sequences=True)(inner_x)]))
    shared = layers.Dense(4)
    h = layers.Add()([shared(numbers), layers.Embedding(5, 4)(ids)])
    h = inner(inner(h))
    h = layers.BatchNormalization()(h)
    last = layers.RNN(LSTMCell(3))(h)
    return keras.Model(
        {"ids": ids, "numbers": numbers},
        {"last": layers.Dense(1, name="a")(last), "each": layers.Dense(2, name="b")(h)},
    )
