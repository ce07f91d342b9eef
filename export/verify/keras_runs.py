"""Runs of Keras that a converted model is compared with: step by step, in one run, and the saved model itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from keras import tree

from cellserve.export.keras_model import keras_private
from cellserve.export.keras_model.load import computing_in, with_dtype
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.verify.random_rounding import random_rounding
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
    """

    def __init__(self, network: StatefulNetwork, dtype: str = "float32") -> None:
        self._network, self._dtype = network, dtype

        def spec(tensor: Any, *leading: int | None) -> tf.TensorSpec:
            return tf.TensorSpec((*leading, *tensor.shape), dtype if tensor.dtype == "float32" else tensor.dtype)

        self._outputs = [spec(each, None) for each in network.outputs]
        # A network in float64 has states of float64.
        self._states = [tf.TensorSpec((None, *state.shape), state.dtype) for state in network.states]
        specs = [spec(each, None, None) for each in network.inputs], self._states
        self._run = tf.function(self._all_steps, input_signature=specs, autograph=False)
        self._run_rounded = tf.function(self._all_rounded, input_signature=specs, autograph=False)

    def step(self, inputs: Sequence[Array], states: Sequence[Array]) -> Tensors:
        """Takes one step: inputs `[rows, 1, ...]` and states to outputs `[rows, 1, ...]` and next states."""
        outputs, history = self.history(inputs, states)
        return outputs, [state[:, 1] for state in history]

    def rounded(self, inputs: Sequence[Array], initial: Sequence[Array], times: int = ROUNDED_RUNS) -> list[History]:
        """Histories of a network in float64 of which each is rounded in its own way (`random_rounding`)."""
        return run_together(partial(self.history, rounded=True), inputs, initial, times)

    def rounded_steps(self, inputs: Sequence[Array], states: Sequence[Array]) -> list[Tensors]:
        """Single steps of which each is rounded in its own way."""
        runs = self.rounded(inputs, states, ROUNDED_STEPS)
        return [(outputs, [state[:, 1] for state in history]) for outputs, history in runs]

    def history(self, inputs: Sequence[Array], initial: Sequence[Array], rounded: bool = False) -> History:
        """Takes all steps of inputs `[rows, steps, ...]` from initial states, exactly or with `random_rounding`."""
        with computing_in(self._dtype), np.errstate(all="ignore"):
            given = self._tensors(initial)
            run = self._run_rounded if rounded else self._run
            outputs, following = run(self._tensors(inputs), given)
        outputs, following = (
            [np.moveaxis(np.asarray(each), 0, 1) for each in tensors] for tensors in (outputs, following)
        )
        before = [np.asarray(state)[:, None] for state in given]
        return outputs, [np.concatenate(pair, axis=1) for pair in zip(before, following, strict=True)]

    def _all_rounded(self, inputs: list[Any], states: list[Any]) -> tuple[list[Any], list[Any]]:
        with random_rounding():
            return self._all_steps(inputs, states)

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
        *_, ys, history = tf.while_loop(lambda t, *_: t < steps, take, (0, states, ys, history), parallel_iterations=1)
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


def run_together(
    run: Callable[[Sequence[Array], Sequence[Array]], Tensors],
    inputs: Sequence[Array],
    states: Sequence[Array],
    times: int,
) -> list[Tensors]:
    """Runs several times what rounds at random, as rows of few batches; returns the results of each run.

    One run of many rows takes much less time than many runs.

    Args:
        run: `KerasSteps.history`.
        inputs: The inputs of each run.
        states: The states of each run.
        times: How many.
    """
    rows = len(inputs[0])
    at_once = min(times, max(1, _MOST_ENTRIES // sum(array.size for array in (*inputs, *states))))
    found: list[Tensors] = []
    while len(found) < times:
        outputs, following = run(
            *([np.concatenate([array] * at_once) for array in given] for given in (inputs, states))
        )
        for first in range(0, rows * at_once, rows):
            found.append(([y[first : first + rows] for y in outputs], [s[first : first + rows] for s in following]))
    return found[:times]


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


def double_of(network: StatefulNetwork) -> KerasSteps | None:
    """The network in float64, with the same weights; None if it cannot be run so (because a cell casts to float32)."""
    try:
        with computing_in("float64"):
            steps = KerasSteps(StatefulNetwork(with_dtype(network.model, "float64")), "float64")
            steps.step(
                [np.zeros((1, 1, *spec.shape), spec.dtype) for spec in network.inputs],
                [np.zeros((1, *state.shape), state.dtype) for state in network.states],
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


def run_saved_model(model: Any, *sequences: Sequence[Array]) -> list[list[Array]]:
    """Runs a Keras model unchanged over whole sequences `[batch, time, *features]`.

    Args:
        model: The model.
        sequences: The inputs of each run.

    Returns:
        The outputs of each run.
    """
    traced = tf.function(model, autograph=False)  # once for all runs of one shape
    return [_run_traced(traced, model, inputs) for inputs in sequences]


def _run_traced(traced: Any, model: Any, inputs: Sequence[Array]) -> list[Array]:
    for layer in keras_private.all_layers(model):
        if getattr(layer, "stateful", False):
            layer.reset_state()
    cast = [np.ascontiguousarray(x).astype(t.dtype) for x, t in zip(inputs, model.inputs, strict=True)]
    structure = tree.pack_sequence_as(keras_private.input_structure(model), _tensors(cast))
    return [np.asarray(y) for y in tree.flatten(traced(structure))]


def run_saved_model_in_double(model: Any, inputs: Sequence[Array]) -> list[list[Array]]:
    """Runs a Keras model in float64, with the same weights, as `run_saved_model` does; then with `random_rounding`.

    Returns:
        The outputs of each run, the exact ones first; none if it cannot be run so.
    """

    def rounded(inputs: Any) -> Any:
        with random_rounding():
            return twin(inputs)

    try:
        with computing_in("float64"):
            twin, given = with_dtype(model, "float64"), list(map(double, inputs))
            traced = tf.function(rounded, autograph=False)
            exact = run_saved_model(twin, given)
            return exact + [_run_traced(traced, twin, given) for _ in range(ROUNDED_RUNS)]
    except Exception:  # from TensorFlow, Keras or a layer's own code
        return []


def double(array: Array) -> Array:
    """The array in float64 if it is of float32."""
    return array.astype(np.float64) if array.dtype == np.float32 else array


def _tensors(arrays: Sequence[Array]) -> list[Any]:
    return [tf.constant(np.ascontiguousarray(array)) for array in arrays]
