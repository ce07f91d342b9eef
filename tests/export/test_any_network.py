"""Recurrent layers of every kind, anywhere in a network: right beside Keras, exact, or predict only with the reason."""

from __future__ import annotations

import functools
import re
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

from tests.export.proving import Proof
from tests.networks import DecayingCell, several_ends

import keras  # isort: skip  after TensorFlow has been imported quietly
from keras import layers, ops  # isort: skip

from cellserve.export.exporter import export
from cellserve.export.onnx_graph.operators import lowering_of, lowers
from cellserve.export.publish.request import ExportRequest
from cellserve.models.cells import LSTMCell, RNNCell
from cellserve.models.signature import MODEL_NAME
from cellserve.service.runtime.onnx_model import Runtime

LSTM = {"bias_initializer": "random_normal"}


def layers_of_keras() -> Any:
    """Keras's own layers and cells, with what their arguments may change; batch, time and memory are fixed on top."""
    x = keras.Input(batch_shape=(3, 10, 4))
    stacked = [layers.GRUCell(3), layers.LSTMCell(4), layers.SimpleRNNCell(2)]
    kinds = [
        layers.LSTM(5, return_sequences=True, **LSTM),
        layers.GRU(5, return_sequences=True, stateful=True, **LSTM),
        layers.SimpleRNN(3, return_sequences=True, use_bias=False, activation="relu"),
        layers.RNN(stacked, return_sequences=True),
    ]
    return keras.Model(x, layers.Concatenate()([layer(x) for layer in kinds]))


def layers_of_keras_with_other_arguments() -> Any:
    """What else their arguments may change."""
    x = keras.Input((10, 4))
    kinds = [
        layers.LSTM(5, return_sequences=True, unroll=True, **LSTM),
        layers.LSTM(3, return_sequences=True, activation="relu", recurrent_activation="hard_sigmoid"),
        layers.LSTM(3, return_sequences=True, use_bias=False, implementation=1),
        layers.LSTM(3, return_sequences=True, unit_forget_bias=False, dropout=0.3, recurrent_dropout=0.2),
        layers.GRU(3, return_sequences=True, reset_after=False, **LSTM),
        layers.GRU(3, return_sequences=True, use_bias=False, dropout=0.3, recurrent_dropout=0.2),
        layers.GRU(3, return_sequences=True, activation="softsign"),
        layers.SimpleRNN(5, return_sequences=True, dropout=0.3, **LSTM),
    ]
    return keras.Model(x, layers.Concatenate()([layer(x) for layer in kinds]))


def masked() -> Any:
    """A mask over cells whose output is a state, and over cells whose output is none; zeros; a mask handed on."""
    x = keras.Input((None, 3))
    h = layers.Masking(-1.0)(x)
    both = layers.RNN(layers.StackedRNNCells([RNNCell(3), layers.LSTMCell(3)]), return_sequences=True)(h)
    kinds = [
        both,
        layers.LSTM(3, return_sequences=True)(both),
        layers.GRU(3, return_sequences=True, zero_output_for_mask=True)(layers.Dense(3, activation="tanh")(h)),
        layers.RNN(RNNCell(3, bias_initializer="random_normal"), return_sequences=True)(h),
        layers.RNN(RNNCell(3, feedback="output"), return_sequences=True, zero_output_for_mask=True)(h),
    ]
    return keras.Model(x, layers.Concatenate()([layers.Activation("linear")(kind) for kind in kinds]))


def masked_in_other_ways() -> Any:
    """A mask through a layer of single time steps, and over a plain recurrence."""
    x = keras.Input((None, 3))
    h = layers.Masking(-1.0)(x)
    kinds = [
        layers.GRU(3, return_sequences=True)(layers.TimeDistributed(layers.Dense(2))(h)),
        layers.SimpleRNN(3, return_sequences=True)(h),
    ]
    return keras.Model(x, layers.Concatenate()([layers.Activation("linear")(kind) for kind in kinds]))


def masked_by_embedding() -> Any:
    """Integers, the mask of an embedding past a residual connection, the last output only."""
    ids = keras.Input((None,))
    h = layers.Embedding(7, 4, mask_zero=True, embeddings_initializer="random_normal")(ids)
    h = layers.Add()([h, layers.LSTM(4, return_sequences=True)(h)])
    h = layers.Dropout(0.5)(layers.LayerNormalization()(h))
    return keras.Model(ids, layers.Dense(3, activation="softmax")(layers.GRU(4)(h)))


@keras.saving.register_keras_serializable("tests")
class Averaging(layers.Layer):
    """Counts the steps: a state that depends on no input, of integers until Keras makes it a number."""

    state_size = (2, 1)

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.kernel = self.add_weight((input_shape[-1], 2), name="kernel")

    def get_initial_state(self, batch_size: int | None = None) -> list[Any]:
        return [ops.zeros((batch_size, 2)), ops.zeros((batch_size, 1), "int32")]

    def call(self, inputs: Any, states: Any) -> Any:
        mean, count = states[0], ops.floor(ops.abs(states[1])) + 1
        mean += (ops.matmul(inputs, self.kernel) - mean) / ops.cast(count, "float32")
        return mean, [mean, count]


@keras.saving.register_keras_serializable("tests")
class Remembering(layers.Layer):
    """A causal convolution: its state is the last three inputs, and its output no state."""

    state_size, output_size = ((3, 3),), 2

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.kernel = self.add_weight((9, 2), name="kernel")

    def get_initial_state(self, batch_size: int | None = None) -> list[Any]:
        return [ops.zeros((batch_size, 3, 3))]

    def call(self, inputs: Any, states: Any) -> Any:
        last = ops.concatenate([states[0][:, 1:], ops.expand_dims(inputs, 1)], axis=1)
        return ops.tanh(ops.matmul(ops.reshape(last, (ops.shape(inputs)[0], 9)), self.kernel)), [last]


def cells_of_users() -> Any:
    """Cells that count, that carry matrices, that stand in stacks of stacks, with a mask and without."""
    x = keras.Input((None, 3))
    stack = layers.StackedRNNCells([layers.StackedRNNCells([RNNCell(2), layers.LSTMCell(3)]), Averaging()])
    cells = [Averaging(), Remembering(), stack]
    outputs = [layers.RNN(cell, return_sequences=True)(x) for cell in cells]
    h = layers.Masking(0.5)(x)
    outputs += [layers.RNN(cell, return_sequences=True)(h) for cell in (Averaging(), Remembering())]
    return keras.Model(x, layers.Concatenate()([layers.Activation("linear")(y) for y in outputs]))


def gelu() -> Any:
    """What TensorFlow makes with Erfc, which tf2onnx does not know: in a layer and in a cell, far from zero too."""
    wide = keras.initializers.RandomNormal(stddev=4)
    inner = [layers.Dense(33, activation="gelu", kernel_initializer=wide), layers.SimpleRNN(5, activation="gelu")]
    return keras.Sequential([keras.Input((None, 3)), *inner])


SOME = (layers_of_keras, masked_by_embedding, several_ends, gelu)
OTHERS = (layers_of_keras_with_other_arguments, masked, masked_in_other_ways, cells_of_users)
NETWORKS = {made.__name__: made for made in (*SOME, *OTHERS)}


@functools.cache
def proof(name: str) -> Proof:
    keras.utils.set_random_seed(5)
    return Proof(NETWORKS[name](), most=1)


@pytest.mark.parametrize(
    "name",
    [
        *(made.__name__ for made in SOME),
        *(pytest.param(made.__name__, marks=pytest.mark.long) for made in OTHERS),
    ],
)
def test_every_form_agrees_with_keras_and_its_bits_depend_on_nothing_else(name: str) -> None:
    proof(name).check()


def test_keras_own_layers_become_operators_where_their_arguments_allow() -> None:
    operators = proof("layers_of_keras").operators
    first, last = operators.values()
    assert {"LSTM", "GRU", "Scan"} <= first
    assert not {"LSTM", "GRU", "RNN", "Loop"} & last


def test_a_masked_network_stepped_by_one_gives_at_every_step_what_keras_predicts_for_the_whole() -> None:
    made = proof("masked")
    x = np.random.default_rng(3).normal(size=(4, 17, 3)).astype(np.float32)
    x[np.random.default_rng(4).random((4, 17)) < 0.4] = -1
    x[1, :6] = -1  # masked before the first step that is not
    true = made.keras.predict(x, verbose=0)
    for runtime in made.forms.values():
        states = runtime.zeros(4)
        for t in range(17):
            y, states = runtime.run(np.ascontiguousarray(x[:, t : t + 1]), np.ones(4, np.int32), states)
            np.testing.assert_allclose(y[:, 0], true[:, t], rtol=1e-5, atol=1e-5)


def test_a_mask_makes_a_state_of_the_output_only_where_the_cell_has_it_not() -> None:
    states = [state.name.split(".")[-1] for state in proof("masked").signature.states]
    assert states.count("output") == 1  # Elman's network: its output is not what is fed back


def test_the_signature_has_the_bounds_of_integers_and_the_masked_value() -> None:
    (ids,) = proof("masked_by_embedding").signature.inputs
    assert (ids.dtype, ids.shape, ids.bounds, ids.masked) == ("int32", (), (0, 6), 0.0)
    (numbers,) = proof("masked").signature.inputs
    assert (numbers.dtype, numbers.masked) == ("float32", -1.0)
    signature = proof("several_ends").signature
    assert [spec.name for spec in signature.inputs] == ["ids", "numbers"]
    assert [spec.name for spec in signature.outputs] == ["each", "last"]
    assert signature.default_output == "all"
    assert proof("masked_by_embedding").signature.default_output == "last"


# Cells that are nearly an LSTM, or derived from one


class Gated(layers.Layer):
    """An LSTM of one kernel, whose parts others change."""

    order = "ifco"
    activations: ClassVar = {"i": ops.sigmoid, "f": ops.sigmoid, "c": ops.tanh, "o": ops.sigmoid}

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units, self.state_size = units, [units, units]

    def build(self, input_shape: tuple[int, ...]) -> None:
        size = 4 * self.units
        self.kernel = self.add_weight((input_shape[-1], size), name="kernel")
        self.recurrent = self.add_weight((self.units, size), name="recurrent", initializer="orthogonal")
        self.bias = self.add_weight((size,), name="bias", initializer="random_normal")

    def call(self, inputs: Any, states: Any) -> Any:
        h, c = states
        z = ops.matmul(inputs, self.kernel) + ops.matmul(h, self.recurrent) + self.bias
        gates = {name: self.activations[name](part) for name, part in zip(self.order, ops.split(z, 4, 1), strict=True)}
        new = self.carry(gates["f"] * c + gates["i"] * gates["c"], c)
        h = gates["o"] * ops.tanh(new)
        return h, [h, new]

    def carry(self, new: Any, old: Any) -> Any:
        return new

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("tests")
class OtherOrder(Gated):
    order = "oicf"


@keras.saving.register_keras_serializable("tests")
class OtherGate(Gated):
    activations: ClassVar = {**Gated.activations, "f": ops.hard_sigmoid}


@keras.saving.register_keras_serializable("tests")
class Clipped(Gated):
    def carry(self, new: Any, old: Any) -> Any:
        return ops.clip(new, -0.1, 0.1)


@keras.saving.register_keras_serializable("tests")
class Decayed(Gated):
    def carry(self, new: Any, old: Any) -> Any:
        return 0.7 * new


@keras.saving.register_keras_serializable("tests")
class ZonedOut(Gated):
    def carry(self, new: Any, old: Any) -> Any:
        return 0.2 * old + 0.8 * new


@keras.saving.register_keras_serializable("tests")
class CarriesItsOutput(Gated):
    def call(self, inputs: Any, states: Any) -> Any:
        h, (_, c) = super().call(inputs, states)
        return c, [h, c]


@keras.saving.register_keras_serializable("tests")
class OursDerived(LSTMCell):
    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
        h, (_, c) = super().call(inputs, states)
        return h, [ops.relu(h), c]


@keras.saving.register_keras_serializable("tests")
class KerasDerived(layers.LSTMCell):
    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
        return super().call(inputs, [states[0], 0.5 * states[1]])


NEARLY = (OtherOrder, Clipped, OursDerived), (OtherGate, Decayed, ZonedOut, CarriesItsOutput, KerasDerived)


@functools.cache
def proof_of_nearly(cells: tuple[type, ...]) -> Proof:
    keras.utils.set_random_seed(6)
    x = keras.Input((None, 3))
    outputs = [layers.RNN(cell(4), return_sequences=True, name=cell.__name__)(x) for cell in cells]
    return Proof(keras.Model(x, outputs))


@pytest.mark.parametrize("cells", [NEARLY[0], pytest.param(NEARLY[1], marks=pytest.mark.long)], ids=["some", "others"])
def test_a_cell_that_only_resembles_an_lstm_is_exported_as_what_it_is(cells: tuple[type, ...]) -> None:
    made = proof_of_nearly(cells)
    made.check()
    assert all("LSTM" not in operators for operators in made.operators.values())
    for parity in made.parity.values():
        for cell in cells:
            own = [difference for difference in parity.differences if difference.layer == cell.__name__]
            assert {difference.run for difference in own} == {"steps", "whole", "chunks", "model", "special"}
            assert all(difference.share <= 1 for difference in own)
    x = np.random.default_rng(0).normal(size=(2, 30, 3)).astype(np.float32)
    runtime = next(iter(made.forms.values()))
    y, _ = runtime.run(x, np.full(2, 30, np.int32), runtime.zeros(2))
    for cell, true in zip(cells, made.keras.predict(x, verbose=0), strict=True):
        np.testing.assert_allclose(y[cell.__name__], true, rtol=1e-5, atol=1e-5)


@keras.saving.register_keras_serializable("tests")
class Softplus(Gated):
    activations: ClassVar = {**Gated.activations, "c": ops.softplus}


def test_a_cell_whose_bits_depend_on_the_batch_is_exact_in_padded_runs_and_its_model_says_so(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((None, 4)), layers.RNN(Softplus(3))]).save(tmp_path / "mine.keras")
    told = StringIO()
    folder = export(ExportRequest(tmp_path / "mine.keras", "mine", tmp_path), Console(file=told, width=999))
    document = Runtime(folder / MODEL_NAME).document
    assert document.exactness.proved
    assert document.exactness.shapes == "multiples of 8 rows"
    assert "differs from the same steps one by one in a batch of another size" in document.exactness.why
    assert "yes: " + document.exactness.why in told.getvalue()


# Networks that cannot be stepped


def both_ways() -> Any:
    x = keras.Input((None, 3))
    h = layers.Bidirectional(layers.RNN(DecayingCell(3), return_sequences=True), merge_mode=None)(x)
    return keras.Model(x, layers.Bidirectional(layers.GRU(2), merge_mode="sum")(layers.Concatenate()(h)))


def both_ways_masked() -> Any:
    ids = keras.Input((None,))
    h = layers.Embedding(6, 4, mask_zero=True, embeddings_initializer="random_normal")(ids)
    h = layers.Bidirectional(layers.GRU(3, return_sequences=True))(h)
    return keras.Model(ids, layers.SimpleRNN(3, go_backwards=True, return_sequences=True)(h))


def convolved() -> Any:
    x = keras.Input((None, 3))
    h = layers.Conv1D(4, 4, strides=2)(x)
    return keras.Model(x, layers.Dense(2)(layers.LSTM(3, return_sequences=True)(h)))


def attended() -> Any:
    x = keras.Input((None, 3), name="x")
    h = layers.LSTM(4, return_sequences=True, name="h")(x)
    attention = layers.MultiHeadAttention(2, 3, name="attention")(h, h, use_causal_mask=True)
    pooled = layers.GlobalMaxPooling1D()(attention)
    return keras.Model(x, [layers.Add(name="each")([h, attention]), layers.Dense(1, name="all")(pooled)])


def repeated() -> Any:
    x = keras.Input((None, 3))
    code = layers.LSTM(3)(x)
    return keras.Model(x, layers.LSTM(2, return_sequences=True)(layers.RepeatVector(4)(code)))


def tagged() -> Any:
    """A layer over each time step by itself, after one that reads both ways."""
    ids = keras.Input((None,))
    h = layers.Embedding(6, 4, mask_zero=True, embeddings_initializer="random_normal")(ids)
    h = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(h)
    h = layers.TimeDistributed(layers.Dense(3, activation="softmax"))(h)
    return keras.Model(ids, layers.GRU(2, return_sequences=True)(h))


def autoencoder() -> Any:
    x = keras.Input((6, 3))
    h = layers.RepeatVector(6)(layers.LSTM(4)(x))
    return keras.Model(x, layers.TimeDistributed(layers.Dense(3))(layers.LSTM(4, return_sequences=True)(h)))


def next_frame() -> Any:
    """Frames that are convolved over time after convolutional recurrences, one of which reads backwards."""
    x = keras.Input((None, 6, 5, 2))
    h = layers.ConvLSTM2D(3, 3, padding="same", return_sequences=True)(x)
    h = layers.BatchNormalization()(h)
    h = layers.ConvLSTM2D(2, 1, padding="same", return_sequences=True, go_backwards=True)(h)
    return keras.Model(x, layers.Conv3D(1, 3, padding="same", activation="sigmoid")(h))


WHOLE = {both_ways: "backwards", both_ways_masked: "backwards", convolved: "mixes time steps"}
WHOLE |= {tagged: "backwards", autoencoder: "does not run over", next_frame: "backwards"}
WHOLE |= {attended: "mixes time steps", repeated: "does not run over the input's time axis"}
LONG = {both_ways, both_ways_masked, tagged, autoencoder, next_frame, attended, repeated}


@pytest.mark.parametrize(
    "made", [pytest.param(made, marks=pytest.mark.long if made in LONG else (), id=made.__name__) for made in WHOLE]
)
def test_a_network_that_cannot_be_stepped_is_whole_says_why_and_is_right(made: Any) -> None:
    keras.utils.set_random_seed(7)
    whole = Proof(made(), most=1)
    whole.check()
    signature = whole.signature
    assert WHOLE[made] in (signature.predict_only or "")
    assert not re.search("{{|__|device", signature.predict_only or ""), "TensorFlow's words"
    assert (signature.states, signature.lengths) == ((), None)
    assert signature.min_steps == (4 if made is convolved else 1)
    assert all("Loop" not in operators for operators in whole.operators.values())
    if made is both_ways:
        assert_rows_are_keras_rows(whole)


def assert_rows_are_keras_rows(whole: Proof) -> None:
    """Whatever sequences of other lengths a row is batched with."""
    rng = np.random.default_rng(2)
    lengths = np.array([3, 9, 3, 1, 9], np.int32)
    x = rng.normal(size=(5, 9, 3)).astype(np.float32)
    for runtime in whole.forms.values():
        y, _ = runtime.run(x, lengths, [])
        for row, length in enumerate(lengths):
            true = whole.keras(x[row : row + 1, :length])[0]
            np.testing.assert_allclose(y[row, 0], true, rtol=1e-5, atol=1e-5)


# A form for a cell of one's own


@functools.cache
def cell_of_the_docs() -> dict[str, Any]:
    """Runs the example of docs/explanation/export.md."""
    text = (Path(__file__).parent.parent.parent / "docs/explanation/export.md").read_text()
    (example,) = re.findall(r"```python\n# my_cells.py\n(.*?)```", text, re.S)
    names: dict[str, Any] = {}
    exec(example, names)
    return names


def test_the_example_of_a_form_for_ones_own_cell_is_exact_and_taken() -> None:
    cell = cell_of_the_docs()["PeepholeLSTMCell"]
    x = keras.Input((None, 3))
    made = Proof(keras.Model(x, layers.RNN(cell(4), return_sequences=True)(layers.Masking(2.0)(x))))
    made.check()
    assert [("LSTM" in operators) for operators in made.operators.values()] == [True, False]
    assert [state.name.split(".")[-1] for state in made.signature.states] == ["h", "c"]


def test_a_form_that_does_not_hold_for_a_cell_is_not_used() -> None:
    names = cell_of_the_docs()
    cell = names["PeepholeLSTMCell"]
    lowers(cell, when=lambda cell: cell.units > 100)(names["peephole_lstm"])
    try:
        assert lowering_of(cell(100)) is None
        assert [lowering_of(cell(101))] == [names["peephole_lstm"]]
        assert lowering_of(type("Derived", (cell,), {})(101)) is None
    finally:
        lowers(cell)(names["peephole_lstm"])
