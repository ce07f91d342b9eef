"""Creates the measured network, an LSTM of 128 units with 16 features and 4 outputs, in the format of each server.

usage: python -m bench.network FOLDER

All have the same weights. For Cellserve: `cells.keras` with our own cell, and its export in `artifacts/bench/1`. For
the peers: `bench.keras` with Keras's LSTM; `step.onnx`, one step with all gates in one Gemm; and `fused.onnx`, the
`LSTM` operator over padded sequences.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

UNITS, FEATURES, OUTPUTS = 128, 16, 4
Weights = dict[str, NDArray[np.float32]]


def weights() -> Weights:
    """Draws the weights, with gates in the order of the ONNX operator: input, output, forget, cell."""
    rng = np.random.default_rng(1)
    limit = 1 / np.sqrt(UNITS)
    shapes = {"W": (4 * UNITS, FEATURES), "R": (4 * UNITS, UNITS), "b": (4 * UNITS,), "Wd": (UNITS, OUTPUTS)}
    return {name: rng.uniform(-limit, limit, shape).astype(np.float32) for name, shape in shapes.items()}


def save_onnx(folder: Path, own: Weights) -> None:
    """Writes the two ONNX models of the peers."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node

    def values(**shapes: tuple[str | int, ...]) -> list[Any]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    def constants(**arrays: NDArray[Any]) -> list[Any]:
        return [numpy_helper.from_array(array, name) for name, array in arrays.items()]

    state = ("batch", UNITS)
    lengths = helper.make_tensor_value_info("lens", TensorProto.INT32, ("batch",))
    fused = helper.make_graph(
        [
            node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
            node("Unsqueeze", ["h", "zero"], ["h0"]),
            node("Unsqueeze", ["c", "zero"], ["c0"]),
            node("LSTM", ["xt", "W", "R", "B", "lens", "h0", "c0"], ["all", "hn", "cn"], hidden_size=UNITS),
            node("Squeeze", ["all", "one"], ["ht"]),
            node("Transpose", ["ht"], ["hidden"], perm=[1, 0, 2]),
            node("MatMul", ["hidden", "Wd"], ["y"]),
        ],
        "fused",
        [*values(x=("batch", "time", FEATURES)), lengths, *values(h=state, c=state)],
        values(y=("batch", "time", OUTPUTS)),
        constants(
            W=own["W"][None],
            R=own["R"][None],
            B=np.concatenate([own["b"], np.zeros_like(own["b"])])[None],
            Wd=own["Wd"],
            zero=np.array([0]),
            one=np.array([1]),
        ),
    )
    step = helper.make_graph(
        [
            node("Concat", ["x", "h"], ["z"], axis=1),
            node("Gemm", ["z", "K", "b"], ["gates"]),
            node("Split", ["gates"], ["i", "o", "f", "k"], axis=1, num_outputs=4),
            *(node("Sigmoid", [gate], [f"{gate}s"]) for gate in "iof"),
            node("Tanh", ["k"], ["ks"]),
            node("Mul", ["fs", "c"], ["kept"]),
            node("Mul", ["is", "ks"], ["added"]),
            node("Add", ["kept", "added"], ["c2"]),
            node("Tanh", ["c2"], ["ct"]),
            node("Mul", ["os", "ct"], ["h2"]),
            node("MatMul", ["h2", "Wd"], ["y"]),
        ],
        "step",
        values(x=("batch", FEATURES), h=state, c=state),
        values(y=("batch", OUTPUTS), h2=state, c2=state),
        constants(K=np.concatenate([own["W"], own["R"]], 1).T.copy(), b=own["b"], Wd=own["Wd"]),
    )
    for graph in (fused, step):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, folder / f"{graph.name}.onnx")


def save_keras(folder: Path, own: Weights) -> None:
    """Writes the network twice: `bench.keras` with Keras's LSTM, `cells.keras` with our cell."""
    import keras

    from cellserve.models.cells import LSTMCell

    def network(recurrent: keras.Layer) -> keras.Model:
        x = keras.Input((None, FEATURES))
        dense = keras.layers.Dense(OUTPUTS, use_bias=False)
        made = keras.Model(x, dense(recurrent(x)))
        dense.set_weights([own["Wd"]])
        return made

    by_gate = {gate: (own["W"][rows], own["R"][rows], own["b"][rows]) for gate, rows in _GATES.items()}
    theirs = keras.layers.LSTM(UNITS, return_sequences=True)
    keras_network = network(theirs)
    in_order = [by_gate[gate] for gate in "ifco"]
    theirs.set_weights([np.concatenate([gate[k] for gate in in_order]).T for k in range(3)])
    keras_network.save(folder / "bench.keras")

    cell = LSTMCell(UNITS)
    our_network = network(keras.layers.RNN(cell, return_sequences=True))
    for gate, (w, r, b) in by_gate.items():
        getattr(cell, f"W_{gate}").assign(np.concatenate([r, w], 1).T)
        getattr(cell, f"b_{gate}").assign(b)
    our_network.save(folder / "cells.keras")


_GATES = {gate: slice(k * UNITS, (k + 1) * UNITS) for k, gate in enumerate("iofc")}  # in the order of the ONNX operator


def make(folder: Path) -> dict[str, Any]:
    """Writes all models to a folder; returns the export's timings of our form, tf2onnx's and Keras."""
    from cellserve.models.tensorflow_import import import_tensorflow

    import_tensorflow()
    from cellserve.export.exporter import export
    from cellserve.export.publish.request import ExportRequest
    from cellserve.service.runtime.onnx_model import Runtime

    own = weights()
    save_onnx(folder, own)
    save_keras(folder, own)
    made = export(ExportRequest(folder / "cells.keras", "bench", folder / "artifacts"), Console(quiet=True))
    return dict(Runtime(made / "model.onnx").document.timings)


if __name__ == "__main__":
    print(json.dumps(make(Path(sys.argv[1]))))
