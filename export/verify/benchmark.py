"""Times runs of models, interleaved: forms of a network, tf2onnx's conversion of Keras's loop, and Keras."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import tensorflow as tf

from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.builder import all_nodes
from cellserve.export.onnx_graph.sequence_network import SequenceNetwork
from cellserve.export.onnx_graph.tf_trace import convert, trace
from cellserve.models.signature import Signature
from cellserve.service.runtime.batch_invariance import random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import unpack

_RECURRENT = ("Loop", "Scan", "LSTM", "GRU", "RNN")  # operators that tf2onnx may write for a recurrence
SHAPES = ((1, 1), (64, 1), (1, 50), (8, 50), (64, 50))  # batch x time
_ROUNDS, _SECONDS = 5, 0.01  # rounds of a measurement, and the shortest time of one run's turn in a round
Run = Callable[[], Any]


def shapes(signature: Signature) -> tuple[tuple[int, int], ...]:
    """The (batch, time) sizes to measure: only whole sequences if the model cannot be stepped."""
    if signature.predict_only is None:
        return SHAPES
    steps = max(50, signature.min_steps)
    return (1, steps), (8, steps)


@dataclass(frozen=True, slots=True)
class Alternatives:
    """What the forms of a network are timed beside: tf2onnx's own conversion, and Keras."""

    makers: Mapping[str, Callable[[Any, list[Any]], Run | None]]  # (x, states) -> a run to time; None if it fails
    operators: str  # operators that tf2onnx writes for the recurrences; "" if it cannot convert them


NO_ALTERNATIVES = Alternatives({}, "")


def alternatives(network: StatefulNetwork | SequenceNetwork) -> Alternatives:
    """Converts a network with tf2onnx alone, and prepares Keras's own run."""
    # One trace for both and for all shapes: a trace takes longer than the runs.
    try:
        keras_run = trace_keras(network)
    except Exception:  # from TensorFlow, Keras or a layer's own code
        return Alternatives({"tf2onnx": _fails, "keras": _fails}, "")
    session, operators = _tf2onnx(keras_run, network)

    def keras(x: Any, states: list[Any]) -> Run | None:
        tensors = [tf.constant(array) for array in (*unpack(x), *states)]
        return _if_it_runs(lambda: keras_run(*tensors))

    return Alternatives({"tf2onnx": lambda x, states: _tf2onnx_run(session, x, states), "keras": keras}, operators)


def trace_keras(network: StatefulNetwork | SequenceNetwork) -> Any:
    """Keras's own run, compiled by TensorFlow: inputs and states as tensors to outputs and next states."""
    count = len(network.inputs)

    def run(*tensors: Any) -> list[Any]:
        outputs, following = network.run(tensors[:count], tensors[count:])
        return [tf.identity(tensor) for tensor in (*outputs, *following)]

    return trace(run, _specs(network))


def measure(
    forms: Sequence[Runtime], beside: Alternatives = NO_ALTERNATIVES
) -> tuple[list[dict[str, float]], dict[str, dict[str, float | None]]]:
    """Measures forms of one network and the alternatives, all in turn.

    Args:
        forms: The forms, which have one signature.
        beside: The alternatives.

    Returns:
        Microseconds per run, by "batch x time": of each form; and of each alternative by its maker, None if it cannot
        be run.
    """
    rng = np.random.default_rng(2)
    ours: list[dict[str, float]] = [{} for _ in forms]
    others: dict[str, dict[str, float | None]] = {}
    for batch, steps in shapes(forms[0].signature):
        shape = f"{batch}x{steps}"
        x, states = random_inputs(forms[0].signature, batch, steps, rng)
        made = {name: maker(x, states) for name, maker in beside.makers.items()}
        runs = {str(place): _ours(form, x, states) for place, form in enumerate(forms)}
        times = time_interleaved({**runs, **{name: run for name, run in made.items() if run}})
        for place, form_times in enumerate(ours):
            form_times[shape] = times[str(place)]
        others[shape] = {name: times.get(name) for name in made}
    return ours, others


def time_interleaved(runs: Mapping[str, Run]) -> dict[str, float]:
    """Microseconds per run; runs take turns, round by round, so that a slow moment of the machine affects them all."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # the first run of a shape allocates memory
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            taken[name].append(microseconds(run))
    return {name: float(np.median(times)) for name, times in taken.items()}


def _specs(network: StatefulNetwork | SequenceNetwork) -> list[Any]:
    """The inputs and states of a run over whole sequences, for any batch and any number of time steps."""
    specs = [tf.TensorSpec([None, None, *spec.shape], spec.dtype) for spec in network.inputs]
    return specs + [tf.TensorSpec([None, *state.shape], state.dtype) for state in network.signature.states]


def _tf2onnx(keras_run: Any, network: StatefulNetwork | SequenceNetwork) -> tuple[ort.InferenceSession | None, str]:
    """tf2onnx's own conversion of Keras's loop (None if it fails), and its recurrent operators."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        model = convert(keras_run, network.model)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:
        return None, ""
    operators = {node.op_type for node in all_nodes(model.graph.node)}
    return session, ", ".join(operator for operator in _RECURRENT if operator in operators)


def _tf2onnx_run(session: ort.InferenceSession | None, x: Any, states: list[Any]) -> Run | None:
    """A run of tf2onnx's conversion, to be timed; None if it fails."""
    if session is None:
        return None
    feed = dict(zip((tensor.name for tensor in session.get_inputs()), (*unpack(x), *states), strict=True))
    return _if_it_runs(lambda: session.run(None, feed))


def _fails(x: Any, states: list[Any]) -> None:
    return None


def _if_it_runs(run: Run) -> Run | None:
    try:
        run()
    except Exception:  # from TensorFlow, Keras or ONNX Runtime
        return None
    return run


def _ours(runtime: Runtime, x: Any, states: list[Any]) -> Run:
    lengths = np.full(len(x), x.shape[1], np.int32)
    return lambda: runtime.run(x, lengths, states)


def runs(runtime: Runtime, shapes: Iterable[tuple[int, int]]) -> dict[str, Run]:
    """Runs of a model, to be timed, by "batch x time"."""
    rng = np.random.default_rng(2)
    return {f"{b}x{t}": _ours(runtime, *random_inputs(runtime.signature, b, t, rng)) for b, t in shapes}


def microseconds(run: Run, seconds: float = _SECONDS) -> float:
    """Median time of a run in microseconds, over at least `seconds`."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)) * 1e6
