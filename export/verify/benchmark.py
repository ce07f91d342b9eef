"""Times runs of models, interleaved: ours, tf2onnx's conversion of Keras's loop, and Keras."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
import tensorflow as tf

from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.builder import all_nodes
from cellserve.export.onnx_graph.sequence_network import SequenceNetwork
from cellserve.export.onnx_graph.tf_trace import convert
from cellserve.models.signature import Signature
from cellserve.service.runtime.batch_invariance import random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import unpack

_RECURRENT = ("Loop", "Scan", "LSTM", "GRU", "RNN")  # operators that tf2onnx may write for a recurrence
SHAPES = ((1, 1), (64, 1), (1, 50), (8, 50), (64, 50))  # batch x time


def shapes(signature: Signature) -> tuple[tuple[int, int], ...]:
    """The (batch, time) sizes to measure: only whole sequences if the model cannot be stepped."""
    if signature.predict_only is None:
        return SHAPES
    steps = max(50, signature.min_steps)
    return (1, steps), (8, steps)


def side_by_side(
    network: StatefulNetwork | SequenceNetwork, ours: Runtime, float32: Runtime | None = None
) -> tuple[dict[str, dict[str, float | None]], str]:
    """Measures tf2onnx's own conversion, our model and Keras, interleaved.

    Args:
        network: The network.
        ours: Our model.
        float32: The float32 model, measured too if `ours` has lower precision.

    Returns:
        Microseconds per run by shape and maker; the operators that tf2onnx writes for the recurrences, or "".
    """
    signature = ours.signature
    theirs, operators = _tf2onnx(network)
    keras_run = tf.function(network.run, autograph=False)
    rng = np.random.default_rng(2)
    table: dict[str, dict[str, float | None]] = {}
    for batch, steps in shapes(signature):
        x, states = random_inputs(signature, batch, steps, rng)
        inputs = [tf.constant(array) for array in unpack(x)]
        runs: dict[str, Callable[[], Any] | None] = {
            "tf2onnx": _tf2onnx_run(theirs, x, states),
            "ours": _ours(ours, x, states),
            **({"float32": _ours(float32, x, states)} if float32 else {}),
            "keras": partial(keras_run, inputs, list(map(tf.constant, states))),
        }
        table[f"{batch}x{steps}"] = time_interleaved(runs)
    return table, operators


def time_interleaved(runs: Mapping[str, Callable[[], Any] | None], rounds: int = 5) -> dict[str, float | None]:
    """Times several runs round by round, so that a slow moment of the machine affects all of them."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if run:
                taken[name].append(microseconds(run, seconds=0.02))
    return {name: float(np.median(times)) if times else None for name, times in taken.items()}


def _tf2onnx(network: StatefulNetwork | SequenceNetwork) -> tuple[ort.InferenceSession | None, str]:
    """tf2onnx's own conversion of Keras's loop (None if it fails), and its recurrent operators."""

    def run(*tensors: Any) -> list[Any]:
        count = len(network.inputs)
        outputs, following = network.run(tensors[:count], tensors[count:])
        return [tf.identity(tensor) for tensor in (*outputs, *following)]

    specs = [tf.TensorSpec([None, None, *spec.shape], spec.dtype) for spec in network.inputs]
    specs += [tf.TensorSpec([None, *state.shape], state.dtype) for state in network.signature.states]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        model = convert(run, specs, network.model)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:
        return None, ""
    operators = {node.op_type for node in all_nodes(model.graph.node)}
    return session, ", ".join(operator for operator in _RECURRENT if operator in operators)


def _tf2onnx_run(session: ort.InferenceSession | None, x: Any, states: list[Any]) -> Callable[[], Any] | None:
    """A run of tf2onnx's conversion, to be timed; None if it fails."""
    if session is None:
        return None
    feed = dict(zip((tensor.name for tensor in session.get_inputs()), (*unpack(x), *states), strict=True))
    try:
        session.run(None, feed)
    except Exception:
        return None
    return lambda: session.run(None, feed)


def _ours(runtime: Runtime, x: Any, states: list[Any]) -> Callable[[], Any]:
    lengths = np.full(len(x), x.shape[1], np.int32)
    return lambda: runtime.run(x, lengths, states)


def runs(runtime: Runtime, shapes: Iterable[tuple[int, int]]) -> dict[str, Callable[[], Any]]:
    """Runs of a model, to be timed, by "batch x time"."""
    rng = np.random.default_rng(2)
    return {f"{b}x{t}": _ours(runtime, *random_inputs(runtime.signature, b, t, rng)) for b, t in shapes}


def microseconds(run: Callable[[], Any], seconds: float = 0.1) -> float:
    """Median time of a run in microseconds, over about `seconds` after a warm-up."""
    for _ in range(3):
        run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)) * 1e6
