"""Runs of Keras that a converted model is compared with: step by step, in one run, and the saved model itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from keras import tree

from cellserve.export.keras_model import keras_private
from cellserve.export.keras_model.load import with_dtype
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.verify.double_precision import in_double
from cellserve.service.runtime.batch_invariance import Array

ROUNDED_RUNS, ROUNDED_STEPS = 8, 32  # with random rounding; single steps are cheap
_MOST_CONSTANTS = 64
_MOST_ENTRIES = 2**22  # of the tensors of runs that are made as one

Tensors = tuple[list[Array], list[Array]]  # inputs and states, or outputs and states, each [rows, ...]
History = Tensors  # outputs [rows, steps, ...]; states before each step and after the last, [rows, steps + 1, ...]


class KerasSteps:
    """A network in Keras, step by step; traced once for any number of rows.

    Args:
        network: The network.
        dtype: What it computes in, float32 or float64.
        context: What it is traced in.
    """

    def __init__(
        self,
        network: StatefulNetwork,
        dtype: str = "float32",
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._network, self._dtype, self._context = network, dtype, context

        def spec(tensor: Any, *leading: int | None) -> tf.TensorSpec:
            return tf.TensorSpec((*leading, *tensor.shape), dtype if tensor.dtype == "float32" else tensor.dtype)

        self._outputs = [spec(each, None) for each in network.outputs]
        # A network in float64 has states of float64.
        self._states = [tf.TensorSpec((None, *state.shape), state.dtype) for state in network.states]
        specs = [spec(each, None, None) for each in network.inputs], self._states
        self._run = tf.function(self._all_steps, input_signature=specs, autograph=False)

    def step(self, inputs: Sequence[Array], states: Sequence[Array]) -> Tensors:
        """Takes one step: inputs `[rows, 1, ...]` and states to outputs `[rows, 1, ...]` and next states."""
        outputs, history = self.history(inputs, states)
        return outputs, [state[:, 1] for state in history]

    def history(self, inputs: Sequence[Array], initial: Sequence[Array]) -> History:
        """Takes all steps of inputs `[rows, steps, ...]` from initial states."""
        with np.errstate(all="ignore"):
            given = self._tensors(initial)
            outputs, following = self._run(self._tensors(inputs), given)
        outputs, following = (
            [np.moveaxis(np.asarray(each), 0, 1) for each in tensors] for tensors in (outputs, following)
        )
        before = [np.asarray(state)[:, None] for state in given]
        return outputs, [np.concatenate(pair, axis=1) for pair in zip(before, following, strict=True)]

    def _all_steps(self, inputs: list[Any], states: list[Any]) -> tuple[list[Any], list[Any]]:
        """Outputs and next states of each step, `[steps, rows, ...]`: steps one by one, none in a loop of Keras."""
        steps = tf.shape(inputs[0])[1]

        def take(t: Any, states: list[Any], ys: list[Any], history: list[Any]) -> tuple[Any, ...]:
            y, following = self._network.run([x[:, t][:, None] for x in inputs], states)
            y = [tf.cast(each[:, 0], spec.dtype) for each, spec in zip(y, self._outputs, strict=True)]
            following = [
                tf.ensure_shape(tf.cast(each, spec.dtype), spec.shape)
                for each, spec in zip(following, self._states, strict=True)
            ]
            ys = [array.write(t, each) for array, each in zip(ys, y, strict=True)]
            return t + 1, following, ys, [array.write(t, each) for array, each in zip(history, following, strict=True)]

        ys, history = ([tf.TensorArray(spec.dtype, steps) for spec in specs] for specs in (self._outputs, self._states))
        with self._context():
            *_, ys, history = tf.while_loop(
                lambda t, *_: t < steps, take, (0, states, ys, history), parallel_iterations=1
            )
        return [array.stack() for array in ys], [array.stack() for array in history]

    @property
    def constants(self) -> Array:
        """The numbers that stand in its layers' and cells' code, `[n]`: places where it may take another branch."""
        return constants_of(self._run.get_concrete_function())

    def _tensors(self, arrays: Sequence[Array]) -> list[Any]:
        return [
            tf.constant(np.ascontiguousarray(array.astype(self._dtype) if array.dtype.kind == "f" else array))
            for array in arrays
        ]


class DoubleSteps:
    """A network in float64, step by step: exact, and rounded at random, each run in its own way (`in_double`).

    Args:
        network: The network.
    """

    def __init__(self, network: StatefulNetwork) -> None:
        with in_double():
            twin = StatefulNetwork(with_dtype(network.model, "float64"))
        self._exact = KerasSteps(twin, "float64", in_double)
        self._rounded = KerasSteps(twin, "float64", partial(in_double, rounded=True))

    def histories(self, inputs: Sequence[Array], initial: Sequence[Array], times: int = ROUNDED_RUNS) -> list[History]:
        """The history of inputs `[rows, steps, ...]` from initial states: exact, then rounded.

        The rounded ones are rows of few runs, which takes much less time than many runs.
        """
        rows = len(inputs[0])
        entries = sum(array.size for array in (*inputs, *initial))
        at_once = min(times, max(1, _MOST_ENTRIES // entries))
        found = [self._exact.history(inputs, initial)]
        while len(found) <= times:
            several = ([np.concatenate([array] * at_once) for array in arrays] for arrays in (inputs, initial))
            outputs, states = self._rounded.history(*several)
            for first in range(0, rows * at_once, rows):
                run = np.s_[first : first + rows]
                found.append(([output[run] for output in outputs], [state[run] for state in states]))
        return found[: times + 1]

    def steps(self, inputs: Sequence[Array], states: Sequence[Array]) -> list[Tensors]:
        """Single steps of inputs `[rows, 1, ...]`: outputs `[rows, 1, ...]` and next states; exact, then rounded."""
        runs = self.histories(inputs, states, ROUNDED_STEPS)
        return [(outputs, [state[:, 1] for state in history]) for outputs, history in runs]


def constants_of(traced: Any) -> Array:
    """The float numbers that stand in the graph of a concrete function, `[n]`."""
    definition = traced.graph.as_graph_def()
    found: set[float] = set()
    for node in itertools.chain(definition.node, *(each.node_def for each in definition.library.function)):
        if node.op == "Const" and tf.dtypes.as_dtype(node.attr["dtype"].type).is_floating:
            value = tf.make_ndarray(node.attr["value"].tensor)
            if value.size <= _MOST_CONSTANTS:
                found.update(value.astype(np.float32).ravel().tolist())
    return np.array(sorted(filter(np.isfinite, found))[:_MOST_CONSTANTS], np.float32)


def double_of(network: StatefulNetwork) -> DoubleSteps | None:
    """The network in float64, with the same weights; None if it cannot be run so."""
    try:
        steps = DoubleSteps(network)
        steps.histories(
            [np.zeros((1, 1, *spec.shape), spec.dtype) for spec in network.inputs],
            [np.zeros((1, *state.shape), state.dtype) for state in network.states],
            times=1,
        )
    except Exception:  # from TensorFlow, Keras or a layer's own code
        return None
    return steps


def run_network(
    network: StatefulNetwork, inputs: Sequence[Array], states: Sequence[Array], mask: Array
) -> tuple[list[Array], list[Array]]:
    """Runs whole sequences in Keras's own loops: outputs `[rows, time, ...]` and the states after each row's end."""
    run = tf.function(network.run, autograph=False)
    outputs, final = run(_tensors(inputs), _tensors(states), tf.constant(mask))
    return list(map(np.asarray, outputs)), list(map(np.asarray, final))


def run_saved_model(model: Any, inputs: Sequence[Array]) -> list[Array]:
    """Runs a Keras model unchanged over whole sequences `[batch, time, *features]`; returns its outputs."""
    return _run_traced(tf.function(model, autograph=False), model, inputs)


def run_saved_model_in_double(model: Any, inputs: Sequence[Array]) -> list[list[Array]]:
    """Runs a Keras model in float64, with the same weights, as `run_saved_model` does: exact, then rounded at random.

    Returns:
        The outputs of each run; none if it cannot be run so.
    """

    def rounded(inputs: Any) -> Any:
        with in_double(rounded=True):
            return twin(inputs)

    try:
        with in_double():
            twin, given = with_dtype(model, "float64"), list(map(double, inputs))
            exact = run_saved_model(twin, given)
        traced = tf.function(rounded, autograph=False)  # once for all runs
        return [exact, *(_run_traced(traced, twin, given) for _ in range(ROUNDED_RUNS))]
    except Exception:  # from TensorFlow, Keras or a layer's own code
        return []


def _run_traced(traced: Any, model: Any, inputs: Sequence[Array]) -> list[Array]:
    for layer in keras_private.all_layers(model):
        if getattr(layer, "stateful", False):
            layer.reset_state()
    cast = [np.ascontiguousarray(x).astype(t.dtype) for x, t in zip(inputs, model.inputs, strict=True)]
    structure = tree.pack_sequence_as(keras_private.input_structure(model), _tensors(cast))
    return [np.asarray(y) for y in tree.flatten(traced(structure))]


def double(array: Array) -> Array:
    """The array in float64 if it is of float32."""
    return array.astype(np.float64) if array.dtype == np.float32 else array


def _tensors(arrays: Sequence[Array]) -> list[Any]:
    return [tf.constant(np.ascontiguousarray(array)) for array in arrays]
