"""The export at batch 1 and 50 time steps, by size of the network, beside ONNX Runtime's operator alone and Keras.

usage: python -m bench.export_times FOLDER ROUNDS

Prints microseconds a run, by network and maker, of each round. All run on one core in one process, in turn. The export
is the form that `cellserve export` takes of our LSTM cells, their `LSTM` operator; its proof, which takes minutes for
1,024 units, is left out. The largest network of one layer is written to `FOLDER/large`, to be served.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from bench.answers import TOLERANCE, DifferentAnswers
from bench.dialects import FEATURES, OUTPUTS
from bench.peers.lstm import load

SIZES = ((128, 1), (512, 1), (512, 2), (1024, 1), (1024, 2))  # units, layers
LARGE = 1024  # units of the network that is served
STEPS = 50
SECONDS = 0.1  # of a run's turn in a round, at least
Run = Callable[[], Any]


def network(units: int, layers: int) -> Any:
    """Returns a Keras network of our LSTM cells."""
    import keras

    from cellserve.models.cells import LSTMCell

    keras.utils.set_random_seed(1)
    x = y = keras.Input((None, FEATURES))
    for _ in range(layers):
        y = keras.layers.RNN(LSTMCell(units), return_sequences=True)(y)
    return keras.Model(x, keras.layers.Dense(OUTPUTS, use_bias=False)(y))


def operator(model: Any, path: Path) -> ort.InferenceSession:
    """Writes the operators alone, with a network's weights, over x `[time, batch, features]`; opens them."""
    import keras
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node
    nodes, constants, states, y = [], {"axis": np.array([1])}, [], "x"
    cells = [layer.cell for layer in model.layers if isinstance(layer, keras.layers.RNN)]
    for place, cell in enumerate(cells):
        units = cell.units
        weights = [getattr(cell, f"W_{gate}").numpy().T for gate in "iofc"]  # [units, units + features]
        biases = [getattr(cell, f"b_{gate}").numpy() for gate in "iofc"]
        constants |= {
            f"R{place}": np.concatenate([weight[:, :units] for weight in weights])[None],
            f"W{place}": np.concatenate([weight[:, units:] for weight in weights])[None],
            f"B{place}": np.concatenate([*biases, np.zeros(4 * units, np.float32)])[None],
        }
        own = [f"{name}{place}" for name in "WRB"]
        given, following = ([f"{state}{place}{after}" for state in "hc"] for after in ("", "n"))
        states += [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, "batch", units)) for name in given]
        nodes.append(node("LSTM", [y, *own, "", *given], [f"all{place}", *following], hidden_size=units))
        y = f"y{place}"
        nodes.append(node("Squeeze", [f"all{place}", "axis"], [y]))
    nodes.append(node("MatMul", [y, "Wd"], ["y"]))
    constants["Wd"] = model.layers[-1].kernel.numpy()
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("time", "batch", size))
            for name, size in (("x", FEATURES), ("y", OUTPUTS))]  # fmt: skip
    following = [info.name + "n" for info in states]
    graph = helper.make_graph(
        nodes,
        "operator",
        [ends[0], *states],
        [ends[1], *(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in following)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return load(str(path))


def makers(model: Any, path: Path) -> tuple[dict[str, Run], bytes]:
    """Returns a run of the export, of the operator and of Keras; and the exported model.

    Each run returns y `[50, outputs]`.
    """
    import tensorflow as tf

    from cellserve.export.candidates.candidates import build, open_model, operator_choices, with_document
    from cellserve.export.exporter import network_of
    from cellserve.export.verify.benchmark import trace_keras
    from cellserve.models.signature import Exactness, ModelDocument

    stateful = network_of(model)
    document = ModelDocument(name="large", signature=stateful.signature, exactness=Exactness(proved=True, why=""))
    _, operators = next(operator_choices(stateful))
    graph, _ = build(stateful, stateful.signature, operators)
    ours, bare = open_model(graph, None, document), operator(model, path)
    x = np.random.default_rng(0).normal(size=(1, STEPS, FEATURES)).astype(np.float32)
    zeros = [np.zeros((1, *state.shape), np.float32) for state in stateful.signature.states]
    lengths, tensor, tensors = np.array([STEPS], np.int32), tf.constant(x), [tf.constant(zero) for zero in zeros]
    feed = {tensor.name: zeros[0][None] for tensor in bare.get_inputs()} | {"x": x.transpose(1, 0, 2).copy()}
    keras_run = trace_keras(stateful)
    return {
        "ours": lambda: ours.run(x, lengths, zeros)[0][0],
        "operator": lambda: bare.run(None, feed)[0][:, 0],
        "keras": lambda: keras_run(tensor, *tensors)[0][0],
    }, with_document(graph, document)


def times(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Returns microseconds a run, the median of each round.

    Raises:
        DifferentAnswers: They do not give the same answers.
    """
    from cellserve.export.verify.benchmark import microseconds

    wanted = np.asarray(runs["ours"]())
    for name, run in runs.items():
        difference = np.abs(np.asarray(run()) - wanted).max()
        if not difference < TOLERANCE:
            raise DifferentAnswers(f"the export and {name}: differ by {difference:.2g}")
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
            taken[name].append(microseconds(run, SECONDS))
    return taken


def main(folder: Path, rounds: int) -> None:
    """Prints the times of all networks."""
    from cellserve.models.tensorflow_import import import_tensorflow

    import_tensorflow()

    from cellserve.export.publish import repository_writer
    from cellserve.models.signature import MODEL_NAME

    found = {}
    for units, layers in SIZES:
        runs, content = makers(network(units, layers), folder / f"operator-{units}-{layers}.onnx")
        if (units, layers) == (LARGE, 1):
            repository_writer.write(folder / "large", "large", None, {MODEL_NAME: content})
        found[f"{units}x{layers}"] = times(runs, rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
