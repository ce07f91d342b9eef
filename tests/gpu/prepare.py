"""Makes what the tests on a GPU compare with, at home: `python -m tests.gpu.prepare FOLDER` (it needs TensorFlow).

FOLDER gets `artifacts/`, a repository of the example models, LSTMs of 128 and 1,024 units, a GRU and a ConvLSTM, and
beside it Keras's numbers for each. These networks are there in both their forms, as operators and as loops, since which
is the faster one was never asked of a GPU; one example is there once more as a model that says of itself that it is not
exact.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cellserve.models.signature import MODEL_NAME, STEP_NAME, Exactness, ModelDocument
from cellserve.models.tensorflow_import import import_tensorflow
from tests.gpu.references import ROWS, STEPS, Array, Reference, model_folder

import_tensorflow()

import keras  # noqa: E402
import onnx  # noqa: E402
import tensorflow as tf  # noqa: E402

from cellserve.export.candidates.candidates import build, open_model, operator_choices, with_document  # noqa: E402
from cellserve.export.keras_model.load import load, with_dtype  # noqa: E402
from cellserve.export.keras_model.step_network import StatefulNetwork  # noqa: E402
from cellserve.export.publish import repository_writer  # noqa: E402
from cellserve.models.cells import LSTMCell  # noqa: E402
from cellserve.service.runtime.batch_invariance import QUICK_PLAN, find_shapes, random_inputs  # noqa: E402
from cellserve.service.runtime.onnx_model import Runtime  # noqa: E402

FEATURES, OUTPUTS, SEED = 16, 4, 1024
NOT_PROVED = Exactness(proved=False, why="it was not proved")


def main() -> int:
    """Runs the command; gives its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.prepare", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what to make; there must be nothing yet")
    parser.add_argument("--trained", type=Path, default=Path("trained"), help="the examples' networks")
    parser.add_argument("--models", type=Path, default=Path("artifacts"), help="the examples' models")
    parser.add_argument("--units", type=int, nargs="+", default=[128, 1024], help="of the LSTMs")
    told = parser.parse_args()
    if told.folder.exists():
        return _refused(f"{told.folder} is there already: remove it first")
    networks = {path.stem: path for path in sorted(told.trained.glob("*.keras"))}
    if not networks or not all((told.models / name / "1").is_dir() for name in networks):
        return _refused(f"the example models are not in {told.trained} and {told.models}: run `make setup`")
    unfinished = told.folder.with_name(f"{told.folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, network in networks.items():
        copied = model_folder(unfinished, name)
        shutil.copytree(told.models / name / "1", copied, ignore=shutil.ignore_patterns("*.html"))
        source = Runtime(copied / MODEL_NAME).document.provenance["source_sha256"]
        if source != hashlib.sha256(network.read_bytes()).hexdigest():
            return _refused(f"{told.models / name} was not exported from {network}: remove it and run `make setup`")
        keep_reference(unfinished, name, keras_run(StatefulNetwork(load(network))))
    for units in told.units:
        write_network(unfinished, f"lstm-{units}", lstm(units))
    write_network(unfinished, "gru", gru())
    write_network(unfinished, "conv-lstm", conv_lstm())
    write_unproved(unfinished, "sunspots")
    unfinished.rename(told.folder)
    size = sum(path.stat().st_size for path in told.folder.rglob("*") if path.is_file())
    print(f"{told.folder}: {size / 2**20:.1f} MiB")
    return 0


def lstm(units: int) -> keras.Model:
    """An LSTM with random weights that are the same each time; of 1,024 units it is worth a GPU."""
    return _network(
        keras.Input((None, FEATURES), name="x"),
        keras.layers.RNN(LSTMCell(units, bias_initializer="random_normal"), return_sequences=True, name="lstm"),
        keras.layers.Dense(OUTPUTS, name="out"),
    )


def gru() -> keras.Model:
    """Keras's GRU of 64 units."""
    return _network(
        keras.Input((None, FEATURES), name="x"),
        keras.layers.GRU(64, return_sequences=True, name="gru"),
        keras.layers.Dense(OUTPUTS, name="out"),
    )


def conv_lstm() -> keras.Model:
    """A ConvLSTM over rows of 8 places with 3 channels."""
    return _network(
        keras.Input((None, 8, 3), name="x"),
        keras.layers.ConvLSTM1D(4, 3, padding="same", return_sequences=True, name="conv"),
    )


def _network(*layers: keras.Layer) -> keras.Model:
    keras.utils.set_random_seed(SEED)
    return keras.Sequential(layers)


def write_network(folder: Path, name: str, made: keras.Model) -> None:
    """Writes a network as operators, and as a loop over its step, which may have a graph for single steps too."""
    network = StatefulNetwork(made)
    reference = keras_run(network)
    for form, operators in operator_choices(network):
        graph, step = build(network, network.signature, operators)
        own, step = (name, None) if operators else (f"{name}-scan", step)
        told = ModelDocument(name=own, signature=network.signature, form=form, exactness=NOT_PROVED)
        exactness = find_shapes([open_model(graph, step, told)], QUICK_PLAN)
        print(f"{own} ({form}): {exactness.why}")
        write(folder, told.model_copy(update={"exactness": exactness}), {MODEL_NAME: graph, STEP_NAME: step})
        keep_reference(folder, own, reference)


def write_unproved(folder: Path, name: str) -> None:
    """Writes a model once more as one whose bits are not proved: it is served one row and one step at a time."""
    told = Runtime(model_folder(folder, name) / MODEL_NAME).document
    told = told.model_copy(update={"name": f"{name}-unproved", "exactness": NOT_PROVED})
    write(folder, told, {path.name: onnx.load(path) for path in model_folder(folder, name).glob("*.onnx")})
    shutil.copyfile(folder / f"{name}.npz", folder / f"{told.name}.npz")


def write(folder: Path, told: ModelDocument, graphs: Mapping[str, onnx.ModelProto | None]) -> None:
    files = {file: with_document(graph, told) for file, graph in graphs.items() if graph}
    repository_writer.write(folder / "artifacts", told.name, 1, files)


def keep_reference(folder: Path, name: str, reference: Reference) -> None:
    reference.write(folder / f"{name}.npz")
    print(f"{name}: {ROWS} rows of {STEPS} steps; float32 Keras is off float64 by {reference.keras_error:.1e}")


def keras_run(network: StatefulNetwork) -> Reference:
    """Runs a network with Keras over random inputs from random states, in float32 and in float64."""
    x, states = random_inputs(network.signature, ROWS, STEPS, np.random.default_rng(SEED))
    y, final = _run(network, x, states)
    wide = StatefulNetwork(with_dtype(network.model, "float64"))
    exact_y, exact_final = _run(wide, _wide(x), [_wide(state) for state in states])
    return Reference(x, states, y, final, exact_y, exact_final)


def _run(network: StatefulNetwork, x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
    run = tf.function(network.run, autograph=False)
    (y,), final = run([tf.constant(x)], [tf.constant(state) for state in states])
    return np.asarray(y), [np.asarray(state) for state in final]


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype == np.float32 else array


def _refused(why: str) -> int:
    print(f"prepare: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
