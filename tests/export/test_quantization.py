"""Less precision: exact all the same, within the tolerance on the user's data or refused, and said so everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import FEATURES
from tests.networks import DecayingCell, network, several_ends

import keras  # isort: skip  after TensorFlow has been imported quietly
from keras import layers  # isort: skip

from cellserve.export.candidates import candidates
from cellserve.export.candidates.quantization import calibrated_ranges
from cellserve.export.candidates.quantization_schemes import SCHEMES
from cellserve.export.cli.export import main
from cellserve.export.errors import ExportError
from cellserve.export.exporter import network_of
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.report.page import REPORT_NAME
from cellserve.export.verify.evaluation import TestData
from cellserve.models.cells import LSTMCell
from cellserve.models.signature import MODEL_NAME, STEP_NAME, Exactness, ModelDocument
from cellserve.service.runtime.batch_invariance import QUICK_PLAN, check_batch_invariance
from cellserve.service.runtime.onnx_model import Runtime

UNITS, CLASSES, STEPS, SEQUENCES = 24, 3, 20, 200


def saved(folder: Path, model: Any) -> tuple[Path, Path]:
    """Saves a network, and test data that it gets right."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SEQUENCES, STEPS, *model.inputs[0].shape[2:])).astype(np.float32)
    y = np.asarray(model(x))[:, -1].argmax(axis=-1)
    np.savez(folder / "test.npz", x=x, lengths=np.full(SEQUENCES, STEPS, np.int32), y=y)
    model.save(folder / "mine.keras")
    return folder / "mine.keras", folder / "test.npz"


def mixed() -> Any:
    """Layers of every kind that a scheme knows: a table, an operator, a loop, products around them."""
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((None, FEATURES)),
            layers.Dense(UNITS, activation="tanh", bias_initializer="random_normal"),
            layers.RNN(LSTMCell(UNITS), return_sequences=True),
            layers.GRU(UNITS, return_sequences=True),
            layers.RNN(DecayingCell(UNITS), return_sequences=True),
            layers.Dense(CLASSES, bias_initializer="random_normal"),
        ]
    )


def opened(folder: Path) -> Runtime:
    step = folder / STEP_NAME
    return Runtime(folder / MODEL_NAME, step=step if step.exists() else None)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["int8", "float16"])
def test_every_scheme_is_exact_and_close_to_float32(tmp_path: Path, precision: Any) -> None:
    path, data_path = saved(tmp_path, mixed())
    stateful = network_of(keras.saving.load_model(path))
    assert isinstance(stateful, StatefulNetwork)
    document = ModelDocument(name="m", signature=stateful.signature, exactness=Exactness(proved=False, why=""))
    data = TestData(stateful, data_path)
    exact: dict[str, set[bool]] = {}
    every = [operators for _, operators in candidates.operator_choices(stateful)]
    for operators in (every[0], every[-1]):  # all operators, none
        model, step = candidates.build(stateful, document.signature, operators)
        assert step is not None
        ranges = calibrated_ranges(step, document, data)
        whole = candidates.open_model(model, None, document)
        true, _ = whole.run(data.inputs[0], data.lengths, whole.zeros(SEQUENCES))
        for scheme in SCHEMES[precision]:
            narrow, narrow_step = scheme.rewrite(model, ranges), scheme.rewrite(step, ranges)
            assert narrow is not None, scheme.name
            for steps in (None, narrow_step):
                runtime = candidates.open_model(narrow, steps, document)
                y, _ = runtime.run(data.inputs[0], data.lengths, runtime.zeros(SEQUENCES))
                off = np.abs(y - true).max()
                assert 0 < off < 0.1 * np.abs(true).max(), scheme.name
                exact.setdefault(scheme.name, set()).add(check_batch_invariance([runtime], QUICK_PLAN).proved)
    assert set(map(frozenset, exact.values())) == {frozenset({True})}, exact


@pytest.mark.parametrize(
    "arguments",
    [["--quantize", "int8"], pytest.param(["--precision", "float16"], marks=pytest.mark.long)],
    ids=lambda given: given[1],
)
def test_a_model_of_less_precision_is_smaller_exact_within_tolerance_and_says_what_it_is(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = saved(tmp_path, network(LSTMCell(UNITS * 2), outputs=CLASSES))
    common = ["--models", str(tmp_path / "artifacts"), "--data", str(data), "--name", "mine"]
    assert main([str(path), *common, *arguments, "--tolerance", "0.05"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "in float32 (0.05 may be lost)" in told
    narrow = tmp_path / "artifacts/mine/1"
    ((size, wide),) = re.findall(r"graphs of ([\d.]+) KiB, ([\d.]+) KiB in float32", told)
    assert float(size) < float(wide) * (0.45 if arguments[1] == "int8" else 0.65)
    runtime = opened(narrow)
    document = runtime.document
    assert document.precision == arguments[1]
    assert document.exactness.proved
    assert document.parity["test_metrics_float32"]["accuracy"] == 1.0
    assert document.metrics["accuracy"] >= 0.95
    assert "tolerance" not in document.parity
    assert {spec.dtype for spec in runtime.signature.states} == {"float32"}
    assert {spec.dtype for spec in runtime.signature.inputs} == {"float32"}
    report = (narrow / REPORT_NAME).read_text()
    assert f"in {arguments[1]}" in report


def test_what_costs_more_than_the_tolerance_is_refused_in_one_line_with_the_metric(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    model = network(LSTMCell(UNITS), outputs=CLASSES)
    path, data = saved(tmp_path, model)
    x = rng.normal(size=(50, STEPS, FEATURES)).astype(np.float32)
    # Wanted is what the network gives: any rounding at all makes the error grow manifold.
    np.savez(data, x=x, lengths=np.full(50, STEPS, np.int32), y=np.asarray(model(x)))
    arguments = [str(path), "--name", "mine", "--models", str(tmp_path / "artifacts"), "--data", str(data)]
    assert main([*arguments, "--quantize", "int8"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rmse goes from 0.0000 to" in error
    assert "0.01 is allowed" in error
    assert "nothing was written" in error
    assert not (tmp_path / "artifacts" / "mine").exists()


def test_without_test_data_less_precision_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = saved(tmp_path, network(LSTMCell(4), outputs=CLASSES))
    assert main([str(path), "--name", "mine", "--models", str(tmp_path), "--quantize", "int8"]) == 1
    assert "--data FILE.npz" in capsys.readouterr().err


@pytest.mark.parametrize("tolerance", ["-1", "nan", "much"])
def test_a_tolerance_that_is_no_share_is_refused(tolerance: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["mine.keras", "--name", "mine", f"--tolerance={tolerance}"])
    assert "is not a share such as 0.01" in capsys.readouterr().err


def test_a_row_of_zeros_and_numbers_beyond_the_calibration_are_taken(tmp_path: Path) -> None:
    path, data_path = saved(tmp_path, network(DecayingCell(UNITS), outputs=CLASSES))
    stateful = network_of(keras.saving.load_model(path))
    assert isinstance(stateful, StatefulNetwork)
    document = ModelDocument(name="m", signature=stateful.signature, exactness=Exactness(proved=False, why=""))
    model, step = candidates.build(stateful, document.signature, ())
    assert step is not None
    data = TestData(stateful, data_path)
    ranges = calibrated_ranges(step, document, data)
    seen = np.abs(data.inputs[0]).max()
    assert len(ranges) == 3  # the cell's two products, and the layer's behind it
    assert 0.7 * seen < max(ranges.values()) <= seen  # some of the sequences are stepped through
    x = np.stack([np.zeros((4, FEATURES)), np.full((4, FEATURES), 1e4)]).astype(np.float32)
    for scheme in SCHEMES["int8"][1:3]:
        narrow = scheme.rewrite(model, ranges)
        assert narrow is not None
        runtime = candidates.open_model(narrow, None, document)
        y, states = runtime.run(x, np.full(2, 4, np.int32), runtime.zeros(2))
        assert np.isfinite(y).all()
        assert all(np.isfinite(state).all() for state in states)


@pytest.mark.long
def test_several_inputs_and_outputs_are_scored_by_their_names_and_calibrated(tmp_path: Path) -> None:
    model = several_ends()
    model.save(tmp_path / "mine.keras")
    stateful = network_of(keras.saving.load_model(tmp_path / "mine.keras"))
    assert isinstance(stateful, StatefulNetwork)
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(9, 6, 3)).astype(np.float32)
    ids = rng.integers(0, 5, (9, 6))
    each = rng.normal(size=(9, 6, 2))
    np.savez(tmp_path / "test.npz", numbers=numbers, ids=ids, lengths=rng.integers(1, 7, 9), each=each)
    data = TestData(stateful, tmp_path / "test.npz")
    document = ModelDocument(name="m", signature=stateful.signature, exactness=Exactness(proved=False, why=""))
    model, step = candidates.build(stateful, document.signature, ())
    assert step is not None
    runtime = candidates.open_model(model, None, document)
    scores = data.score(runtime)
    assert scores.keys() == {"each rmse"}
    assert scores == pytest.approx(data.score_keras(runtime), rel=1e-5)
    assert all(0 < largest < 100 for largest in calibrated_ranges(step, document, data).values())


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x": np.zeros(3), "lengths": np.ones(3), "y": np.zeros(3)}, r"\[n, time, 5\] and \[n\] are expected"),
        ({"x": np.zeros((3, 4, 5)), "lengths": np.full(3, 5), "y": np.zeros(3)}, "lengths are expected from 1"),
        ({"x": np.zeros((3, 4, 5)), "lengths": np.ones(3)}, "an .npz with lengths, x and y is expected"),
        ({"lengths": np.ones(3), "y": np.zeros(3)}, "an .npz with lengths, x and y is expected"),
    ],
)
def test_test_data_that_does_not_fit_is_refused_with_what_is_wanted(
    arrays: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    stateful = network_of(network(LSTMCell(4)))
    assert isinstance(stateful, StatefulNetwork)
    np.savez(tmp_path / "test.npz", **arrays)
    with pytest.raises(ExportError, match=reason):
        TestData(stateful, tmp_path / "test.npz")
