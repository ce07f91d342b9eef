"""The export end to end: what comes out is right, exact and without a Loop, or nothing comes out."""

from __future__ import annotations

import functools
import html
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.budgets import examples
from tests.helpers import ROOT
from tests.networks import DecayingCell, network

import keras  # isort: skip  after TensorFlow has been imported quietly
from keras import layers  # isort: skip

import itertools

from cellserve.export.candidates import candidates
from cellserve.export.cli import adopt
from cellserve.export.cli.export import main
from cellserve.export.errors import ExportError
from cellserve.export.exporter import export
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph import operators
from cellserve.export.publish.request import ExportRequest
from cellserve.export.report.page import REPORT_NAME
from cellserve.models.cells import LSTMCell, RNNCell
from cellserve.models.signature import MANIFEST_NAME, MODEL_NAME, STEP_NAME
from cellserve.service.runtime.batch_invariance import QUICK_PLAN
from cellserve.service.runtime.onnx_model import Runtime

CELLS: dict[str, Callable[[int], Any]] = {
    "lstm": lambda units: LSTMCell(units, bias_initializer="random_normal"),
    "elman": lambda units: RNNCell(units, bias_initializer="random_normal"),
    "jordan": lambda units: RNNCell(units, feedback="output", bias_initializer="random_normal"),
    "decaying": lambda units: DecayingCell(units),
}


def exported(model: Any, folder: Path, name: str = "mine", **request: Any) -> Path:
    model.save(folder / f"{name}.keras")
    return export(ExportRequest(folder / f"{name}.keras", name, folder / "artifacts", **request), Console(quiet=True))


def opened(folder: Path) -> Runtime:
    step = folder / STEP_NAME
    return Runtime(folder / MODEL_NAME, step=step if step.exists() else None)


SIZES = {"lstm": (33, 16), "elman": (7, 3), "jordan": (1, 1), "decaying": (7, 3)}  # units, features


@functools.cache
def example(kind: str, units: int, features: int) -> tuple[StatefulNetwork, Runtime]:
    """A network of random weights and its export, made once."""
    keras.utils.set_random_seed(units * 100 + features)
    model = network(CELLS[kind](units), features)
    folder = Path(tempfile.mkdtemp(prefix="cellserve-test-"))
    return StatefulNetwork(model), opened(exported(model, folder))


@pytest.mark.parametrize(
    ("kind", "units", "features"),
    [
        pytest.param(kind, *size, marks=() if SIZES[kind] == size else pytest.mark.long)
        for kind in CELLS
        for size in ((1, 1), (7, 3), (33, 16))
    ],
)
@settings(max_examples=examples(4, 50))
@given(data=st.data())
def test_any_batch_lengths_chunks_and_padding_give_the_bits_of_single_steps_and_keras_numbers(
    kind: str, units: int, features: int, data: st.DataObject
) -> None:
    keras_network, runtime = example(kind, units, features)
    lengths = np.array(data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=20), "lengths"), np.int32)
    padding = data.draw(st.integers(0, 3), "padding")
    batch, time = len(lengths), int(lengths.max())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    x = rng.normal(size=(batch, time + padding, features)).astype(np.float32)
    initial = [rng.uniform(-1, 1, zero.shape).astype(np.float32) for zero in runtime.zeros(batch)]
    y, final = runtime.run(x, lengths, initial)

    valid = np.arange(time + padding) < lengths[:, None]
    (keras_y,), keras_final = keras_network.run([x], initial, valid)
    np.testing.assert_allclose(y[valid], np.asarray(keras_y)[valid], rtol=1e-5, atol=1e-5)
    for ours, true in zip(final, keras_final, strict=True):
        np.testing.assert_allclose(ours, true, rtol=1e-5, atol=1e-5)

    row = data.draw(st.integers(0, batch - 1), "row")
    cuts = data.draw(st.sets(st.integers(1, max(1, int(lengths[row]) - 1)), max_size=6), "cuts")
    states = [state[row : row + 1] for state in initial]
    places = [0, *sorted(cut for cut in cuts if cut < lengths[row]), int(lengths[row])]
    for start, stop in itertools.pairwise(places):
        part = np.ascontiguousarray(x[row : row + 1, start:stop])
        chunk, states = runtime.run(part, np.array([stop - start], np.int32), states)
        np.testing.assert_array_equal(chunk[0], y[row, start:stop])
    for ours, true in zip(states, final, strict=True):
        np.testing.assert_array_equal(ours[0], true[row])


@pytest.mark.parametrize("kind", CELLS)
def test_an_exported_step_contains_no_loop(kind: str) -> None:
    _, runtime = example(kind, *SIZES[kind])
    operators = runtime.document.operators
    assert "Loop" not in operators
    assert operators.keys() & {"Scan", "LSTM"}
    assert runtime.document.exactness.proved


def test_stacked_cells_and_several_layers_with_ordinary_ones_between_are_exported(tmp_path: Path) -> None:
    normalise = layers.Normalization()
    normalise.adapt(np.random.default_rng(0).normal(3, 2, (50, 5)).astype("float32"))
    model = keras.Sequential(
        [
            keras.Input((None, 5)),
            normalise,
            layers.RNN(layers.StackedRNNCells([LSTMCell(6), RNNCell(4)]), return_sequences=True, name="both"),
            layers.Dense(8, activation="tanh"),
            layers.Dropout(0.5),
            layers.RNN(RNNCell(5, feedback="output"), return_sequences=True, name="top"),
            layers.Dense(3, activation="softmax"),
        ]
    )
    runtime = opened(exported(model, tmp_path))
    assert len(runtime.signature.states) == 4
    x = np.random.default_rng(1).normal(3, 2, (4, 9, 5)).astype("float32")
    y, _ = runtime.run(x, np.full(4, 9, np.int32), runtime.zeros(4))
    np.testing.assert_allclose(y, model(x), rtol=1e-5, atol=1e-5)


def test_a_network_that_gives_its_last_output_gives_one_at_every_step_and_defaults_to_the_last(tmp_path: Path) -> None:
    model = network(LSTMCell(6), return_sequences=False)
    runtime = opened(exported(model, tmp_path))
    assert runtime.signature.default_output == "last"
    x = np.random.default_rng(1).normal(size=(2, 7, 5)).astype("float32")
    y, _ = runtime.run(x, np.full(2, 7, np.int32), runtime.zeros(2))
    for steps in (1, 4, 7):
        np.testing.assert_allclose(y[:, steps - 1], model(x[:, :steps]), rtol=1e-5, atol=1e-5)


def test_a_wrong_lowering_is_caught_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swapped(graph: Any, cell: Any, *rest: Any) -> Any:
        class Swapped:
            units = cell.units
            W_i, b_i, W_f, b_f = cell.W_f, cell.b_f, cell.W_i, cell.b_i  # two gates in each other's place
            W_o, b_o, W_c, b_c = cell.W_o, cell.b_o, cell.W_c, cell.b_c

        return operators.lstm(graph, Swapped, *rest)

    monkeypatch.setitem(operators.LOWERINGS, LSTMCell, operators.LOWERINGS[LSTMCell]._replace(lowering=swapped))
    network(LSTMCell(6)).save(tmp_path / "mine.keras")
    status = main([str(tmp_path / "mine.keras"), "--name", "mine", "--models", str(tmp_path / "artifacts")])
    told = capsys.readouterr().err
    assert status == 1
    assert not list(tmp_path.glob("artifacts/**/*.onnx"))
    assert "layer 'recurrent'" in told
    assert "off by" in told


def test_versions_count_on_and_are_never_written_over(tmp_path: Path) -> None:
    model = network(RNNCell(3))
    assert exported(model, tmp_path).name == "1"
    assert exported(model, tmp_path).name == "2"
    assert exported(model, tmp_path, version=7).name == "7"
    with pytest.raises(ExportError, match="already exists"):
        exported(model, tmp_path, version=7)
    assert sorted(path.name for path in (tmp_path / "artifacts/mine").iterdir()) == ["1", "2", "7"]


def test_a_next_version_with_another_signature_warns_and_one_with_the_same_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for units in (3, 3, 4):  # a layer named by Keras: `rnn`, `rnn_1`...
        sequential(layers.RNN(RNNCell(units)), layers.Dense(2)).save(tmp_path / "mine.keras")
        assert main([str(tmp_path / "mine.keras"), "--name", "mine", "--models", str(tmp_path)]) == 0
        told.append(" ".join(capsys.readouterr().out.split()))
    assert "warning" not in told[0] + told[1]
    assert "it carries rnn.h [4] float32 (version 2: rnn.h [3] float32): clients of mine must change" in told[2]


def test_the_manifest_names_every_file_by_its_digest(tmp_path: Path) -> None:
    import hashlib

    folder = exported(network(RNNCell(3)), tmp_path)
    files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    assert {path.name for path in folder.iterdir()} == {*files, MANIFEST_NAME}
    for name, digest in files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("layer", "operator"),
    [(layers.RNN(DecayingCell(3)), "tf2onnx's Loop"), (layers.LSTM(3), "tf2onnx's LSTM")],
    ids=["a cell of one's own", "Keras's LSTM"],
)
@pytest.mark.usefixtures("measuring")
def test_what_tf2onnx_makes_of_the_network_is_called_what_it_is(
    layer: Any, operator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(candidates, "FULL_PLAN", QUICK_PLAN)
    sequential(layer).save(tmp_path / "mine.keras")
    assert main([str(tmp_path / "mine.keras"), "--name", "mine", "--models", str(tmp_path)]) == 0
    assert operator in " ".join(capsys.readouterr().out.split())
    folder = tmp_path / "mine/1"
    assert operator in html.unescape((folder / REPORT_NAME).read_text())
    timings = opened(folder).document.timings
    assert f"tf2onnx's {timings['tf2onnx']}" == operator
    assert timings["1x50"]["tf2onnx"] > 0


@keras.saving.register_keras_serializable("tests")
class StartsFromOnes(RNNCell):
    def get_initial_state(self, batch_size: int | None = None) -> list[Any]:
        return [state + 1 for state in super().get_initial_state(batch_size)]


@keras.saving.register_keras_serializable("tests")
class OfThree(RNNCell):
    """Takes three features, whatever it is built for."""

    def build(self, input_shape: Any) -> None:
        super().build((None, 3))


@keras.saving.register_keras_serializable("tests")
class Doubling(layers.LSTM):
    def call(self, sequences: Any, initial_state: Any = None, mask: Any = None, training: bool = False) -> Any:
        return 2 * super().call(sequences, initial_state, mask, training)


@keras.saving.register_keras_serializable("tests")
class LogGamma(layers.Layer):
    def call(self, inputs: Any) -> Any:
        import tensorflow as tf

        return tf.math.lgamma(tf.abs(inputs) + 1)


def continued() -> Any:
    x = keras.Input((None, 5))
    y, *states = layers.LSTM(3, return_state=True, return_sequences=True, name="encoder")(x)
    return keras.Model(x, layers.LSTM(3, name="decoder")(y, initial_state=states))


def returning() -> Any:
    x = keras.Input((None, 5))
    return keras.Model(x, layers.LSTM(3, return_state=True, name="encoder")(x))


def with_constants() -> Any:
    x, who = keras.Input((None, 5)), keras.Input((3,), name="who")
    return keras.Model([x, who], layers.Concatenate()([layers.LSTM(3)(x), who]))


def sequential(*inner: Any, time: int | None = None) -> Any:
    return keras.Sequential([keras.Input((time, 5)), *inner])


REFUSED: dict[str, Callable[[], Any]] = {
    "no recurrent layer": lambda: sequential(layers.Dense(3)),
    "'decoder' (LSTM) starts from the states of layer 'encoder' (LSTM): export the two as": continued,
    "'encoder' (LSTM) returns its states": returning,
    "the input 'who' has shape (None, 3)": with_constants,
    "leave out layers that need a certain number": lambda: sequential(
        layers.LSTM(3, return_sequences=True), layers.Flatten(), layers.Dense(1), time=4
    ),
    "(Matrix size-incompatible: In[0]: [2,5], In[1]: [3,3]": lambda: sequential(layers.RNN(OfThree(3))),
    "starts from states that are not zero": lambda: sequential(layers.RNN(StartsFromOnes(3))),
    "layer 'doubling'": lambda: sequential(Doubling(3, name="doubling")),
    "layer 'odd' (LogGamma) uses TensorFlow's Lgamma, which tf2onnx cannot convert": lambda: sequential(
        layers.Dense(4), LogGamma(name="odd"), layers.LSTM(3)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_exported_is_refused_in_one_line_with_the_reason(
    reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    REFUSED[reason]().save(tmp_path / "mine.keras")
    capsys.readouterr()
    status = main([str(tmp_path / "mine.keras"), "--name", "mine", "--models", str(tmp_path / "artifacts")])
    told = capsys.readouterr().err
    assert status == 1
    assert reason in told
    assert "{{" not in told
    assert told.count("\n") == 1
    assert not (tmp_path / "artifacts").exists()


def test_a_network_that_cannot_be_stepped_is_written_and_its_report_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sequential(layers.Bidirectional(layers.LSTM(3), name="both")).save(tmp_path / "mine.keras")
    assert main([str(tmp_path / "mine.keras"), "--name", "mine", "--models", str(tmp_path / "artifacts")]) == 0
    assert "layer 'both' (Bidirectional) also reads the sequence backwards" in " ".join(capsys.readouterr().out.split())
    runtime = opened(tmp_path / "artifacts/mine/1")
    assert runtime.document.exactness.proved
    assert runtime.signature.predict_only


CELL = """
import keras
from keras import ops

@keras.saving.register_keras_serializable(package="mine")
class LeakyCell(keras.layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units

    def build(self, input_shape):
        self.kernel = self.add_weight((input_shape[-1], self.units), name="kernel")
        self.built = True

    def call(self, inputs, states):
        state = 0.9 * states[0] + ops.tanh(ops.matmul(inputs, self.kernel))
        return state, [state]

    def get_config(self):
        return {**super().get_config(), "units": self.units}
"""


@pytest.mark.long
def test_a_cell_of_the_users_own_is_exported_by_the_script_without_a_word_of_tensorflow(tmp_path: Path) -> None:
    (tmp_path / "leaky.py").write_text(CELL)
    names: dict[str, Any] = {}
    exec(CELL, names)
    sequential(layers.RNN(names["LeakyCell"](4), return_sequences=True)).save(tmp_path / "mine.keras")
    command = [sys.executable, "-m", "cellserve.export", "mine.keras", "--name", "mine"]
    lost = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_environment())
    assert (lost.returncode, lost.stderr.count("\n")) == (1, 1)
    assert "the class 'LeakyCell' (registered as 'mine>LeakyCell') is not known" in lost.stderr
    assert "--import FILE.py" in lost.stderr
    (tmp_path / "cells").mkdir()
    (tmp_path / "leaky.py").rename(tmp_path / "cells/leaky.py")
    (tmp_path / "cells/all.py").write_text("import leaky")
    command += ["--import", "cells/all.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert "Scan" in done.stdout
    assert (tmp_path / "artifacts/mine/1" / MODEL_NAME).is_file()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["missing.keras", "--name", "x"], "no such file"),
        (["missing.keras", "--name", "x", "--import", "missing.py"], "missing.py: no such file"),
    ],
)
def test_a_missing_file_is_named_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_labels_that_do_not_fit_the_output_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="2 labels for an output of shape"):
        exported(network(RNNCell(3)), tmp_path, labels=("yes", "no"))


def test_a_rollout_that_does_not_fit_the_output_is_refused_and_one_that_does_is_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"rollout 'value': the output \[3\] must be"):
        exported(network(RNNCell(3)), tmp_path, rollout="value")
    fitting = opened(exported(network(RNNCell(3), features=3, outputs=3), tmp_path, rollout="value"))
    assert (fitting.document.rollout, fitting.document.task) == ("value", "forecast")
    assert [layer.kind for layer in fitting.document.drawing] == ["input", "recurrent", "layer", "output"]


@pytest.mark.parametrize("labels", ["yes,", "yes,no,yes", ""])
@pytest.mark.parametrize("command", [main, adopt.main])
def test_labels_that_name_nothing_or_two_entries_are_refused(
    command: Any, labels: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(["mine", "--name", "mine", "--labels", labels])
    assert "argument --labels: " in capsys.readouterr().err.splitlines()[-1]


def test_labels_of_a_card_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "mine.card.json").write_text(json.dumps({"labels": ["a", "b", "a"]}))
    with pytest.raises(ExportError, match=r"mine\.card\.json: the label 'a' is repeated"):
        exported(network(RNNCell(3)), tmp_path)


def test_arguments_override_the_card(tmp_path: Path) -> None:
    sequential(layers.RNN(RNNCell(3), return_sequences=True)).save(tmp_path / "mine.keras")
    (tmp_path / "mine.card.json").write_text(json.dumps({"description": "of the card", "default_output": "all"}))
    command = [str(tmp_path / "mine.keras"), "--name", "mine", "--models", str(tmp_path)]
    assert main([*command, "--description", "of mine", "--default-output", "last"]) == 0
    document = opened(tmp_path / "mine/1").document
    assert (document.description, document.signature.default_output) == ("of mine", "last")
