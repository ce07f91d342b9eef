"""Names of states and ends: those of a network built anew are those of the network before it."""

from __future__ import annotations

from typing import Any

import tests.networks  # noqa: F401  imports TensorFlow quietly

import keras  # isort: skip
from keras import layers  # isort: skip

import re
from pathlib import Path

import pytest

from cellserve.export.exporter import network_of
from cellserve.export.keras_model.load import load
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.report.network_layers import layers_of
from cellserve.export.report.network_svg import draw_network
from cellserve.models.cells import LSTMCell, RNNCell
from cellserve.models.signature import Signature


def signature_of(model: Any, tmp_path: Path) -> Signature:
    """Gives the signature of a network, saved and loaded as for the export."""
    model.save(tmp_path / "mine.keras")
    return network_of(load(tmp_path / "mine.keras")).signature


def stacked() -> Any:
    h = [layers.RNN(RNNCell(3), return_sequences=True), layers.LSTM(3, return_sequences=True), layers.RNN(LSTMCell(2))]
    return keras.Sequential([keras.Input((None, 2)), *h])


def several_ends() -> Any:
    """Inputs and outputs without names of the user's; an operation that is no layer among the outputs."""
    x, also = keras.Input((None, 2)), keras.Input((None, 2))
    h = layers.GRU(3)(x + also)
    return keras.Model([x, also], [layers.Dense(2)(h), layers.Dense(2)(h), h + h])


def whole() -> Any:
    x = keras.Input((None, 2))
    h = layers.Bidirectional(layers.LSTM(3), name="both")(x)  # its name is in the reason, as it is
    return keras.Model(x, [layers.Dense(2)(h), layers.Dense(1)(h)])


def test_a_layer_is_called_in_reports_and_errors_as_its_states_are(tmp_path: Path) -> None:
    """Each layer has one name, wherever the network was built; names that users gave stay."""
    layers.LSTM(2)  # from now on Keras numbers this class
    x = keras.Input((None, 2))
    h = layers.LSTM(2, return_sequences=True)(layers.Dense(3, name="mine")(x))
    inner_x = keras.Input((None, 2))
    inner = keras.Model(inner_x, layers.LSTM(3, return_sequences=True)(inner_x + inner_x))
    keras.Model(x, inner(h)).save(tmp_path / "mine.keras")
    network = network_of(load(tmp_path / "mine.keras"))
    assert isinstance(network, StatefulNetwork)
    assert [recurrence.layer for recurrence in network.recurrences] == ["lstm", "lstm_2"]
    assert [state.name for state in network.states] == ["lstm.h", "lstm.c", "lstm_2.h", "lstm_2.c"]
    assert {"mine (Dense", "lstm (LSTM", "add (Add", "lstm_2 (LSTM"} <= {
        text.rpartition(" [")[0] for text in re.findall(r"[a-z_0-9]+ \(.*?\]", draw_network(layers_of(network)))
    }


@pytest.mark.parametrize("made", [stacked, several_ends, whole])
def test_a_network_built_again_in_one_process_has_the_same_names(made: Any, tmp_path: Path) -> None:
    first = signature_of(made(), tmp_path)
    assert signature_of(made(), tmp_path) == first


def test_names_that_keras_made_are_numbered_by_their_order_in_the_network(tmp_path: Path) -> None:
    names = [state.name for state in signature_of(stacked(), tmp_path).states]
    assert names == ["rnn.h", "lstm.h", "lstm.c", "rnn_2.h", "rnn_2.c"]
    ends = signature_of(several_ends(), tmp_path)
    assert [spec.name for spec in ends.inputs] == ["input_layer", "input_layer_2"]
    assert [spec.name for spec in ends.outputs] == ["dense", "dense_2", "add"]


def test_names_that_users_gave_stay_and_none_is_given_twice(tmp_path: Path) -> None:
    x = keras.Input((None, 2))
    shared = layers.GRU(2, return_sequences=True, name="again")
    h = layers.LSTM(2, return_sequences=True)(shared(shared(x)))
    h = layers.LSTM(2, return_sequences=True)(h)
    h = layers.GRU(2, return_sequences=True, name="lstm_2")(h)  # what the second LSTM would be called
    h = layers.GRU(2, name="encoder_7")(h)
    names = [state.name for state in signature_of(keras.Model(x, h), tmp_path).states]
    assert names == [
        "again.h", "again_2.h", "lstm.h", "lstm.c", "lstm_3.h", "lstm_3.c", "lstm_2.h", "encoder_7.h",
    ]  # fmt: skip
