"""Keras's results for whole sequences, to compare a network that reads whole sequences with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import numpy as np
import tensorflow as tf

from cellserve.export.keras_model import keras_private
from cellserve.export.onnx_graph.sequence_network import SequenceNetwork
from cellserve.export.verify.keras_runs import (
    constants_of,
    run_saved_model,
    run_saved_model_in_double,
)
from cellserve.export.verify.parity import (
    TOLERANCE,
    Difference,
    Parity,
    finite_rows,
    judge,
    limit_of,
    own_error_of,
    relative_error,
)
from cellserve.export.verify.special_reference import errors_of_rows
from cellserve.export.verify.special_values import ROWS, STEPS, draw_special
from cellserve.service.runtime.batch_invariance import Array, random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import unpack

EXTRA_STEPS = (0, 1, 2, 13, 119)  # test lengths: the network's shortest plus each of these


class SequenceReference:
    """Keras's results for sequences of several lengths, to compare a network that reads whole sequences with.

    Args:
        network: The Keras network.
        seed: Seed of the random numbers.
    """

    def __init__(self, network: SequenceNetwork, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.network = network
        self.cases: list[tuple[Array, list[Array]]] = []
        rows, time = network.original.inputs[0].shape[:2]
        for length in (time,) if time else (network.min_steps + extra for extra in EXTRA_STEPS):
            x, _ = random_inputs(network.signature, rows or 3, length, rng)
            self.cases.append((x, run_saved_model(network.original, unpack(x))))
        self.special = SpecialSequences(network, time or max(network.min_steps, STEPS), rng)

    def compare(self, runtime: Runtime, allow_float32_error: bool = True) -> Parity:
        """Runs a model over the sequences of each length, and measures every output."""
        differences, float32_error = [], 0.0
        by_length: dict[int, float] = {}
        for x, true in self.cases:
            for index, ours in enumerate(_run(runtime, x, true, self.network)):
                worst, allowed = float(relative_error(ours, true[index]).max()), TOLERANCE
                by_length[x.shape[1]] = max(worst, by_length.get(x.shape[1], 0.0))
                if allow_float32_error and worst > TOLERANCE:
                    float32_error = max(float32_error, self._keras_float32_error(x, index, true[index]))
                    allowed = float(limit_of(np.array(float32_error)))
                where = f"{x.shape[1]} time steps"
                share = worst / allowed
                differences.append(Difference(*_name_and_layer(self.network, index), "model", worst, share, where))
        if allow_float32_error:
            differences += self.special.differences(runtime)
        rows, time = self.cases[-1][0].shape[:2]
        return Parity(tuple(differences), float32_error, rows, time, tuple(by_length.items()), 0, self.special.unjudged)

    def _keras_float32_error(self, x: Array, index: int, single: Array) -> float:
        """Float32 Keras's own error of one output against a float64 run."""
        runs = run_saved_model_in_double(self.network.original, unpack(x))
        if not runs:
            return 0.0
        exact, *others = (run[index] for run in runs)
        return float(own_error_of(single, exact, others).max())


class SpecialSequences:
    """Keras's results for whole sequences with special numbers among ordinary ones.

    Where Keras's outputs of a sequence are finite, ours must equal them; where they are not, ours must not be either.

    Args:
        network: The Keras network.
        steps: The length of the sequences.
        rng: Draws the numbers.
    """

    def __init__(self, network: SequenceNetwork, steps: int, rng: np.random.Generator) -> None:
        self.network = network
        specs = [tf.TensorSpec((ROWS, steps, *spec.shape), spec.dtype) for spec in network.inputs]
        traced = tf.function(lambda *x: network.run(x)[0], autograph=False).get_concrete_function(*specs)
        self.x, _ = draw_special(network.signature, constants_of(traced), rng, steps)
        self.y = [np.asarray(y) for y in traced(*map(tf.constant, unpack(self.x)))]
        self.good = np.logical_and.reduce([finite_rows(y) for y in self.y])
        self.unjudged = 0

    def differences(self, runtime: Runtime) -> Iterator[Difference]:
        """Runs a model on the special numbers and measures every output."""
        self.unjudged = 0
        outputs = _run(runtime, self.x, self.y, self.network)
        finite = np.logical_and.reduce([finite_rows(y) for y in outputs])
        for index, (ours, true) in enumerate(zip(outputs, self.y, strict=True)):
            error = errors_of_rows(ours, true, self.good, finite)
            places = [f"{self.x.shape[1]} time steps"] * len(error)
            name_and_layer = _name_and_layer(self.network, index)
            found, unjudged = judge("special", error, partial(self._own_error, index), name_and_layer, places)
            self.unjudged += unjudged
            yield found

    def _own_error(self, index: int) -> Array:
        return self._own_errors[index]

    @cached_property
    def _own_errors(self) -> list[Array]:
        """Float32 Keras's own errors in each sequence, `[rows]`, of each output."""
        runs = run_saved_model_in_double(self.network.model, unpack(self.x)) or [self.y]
        found = []
        for index, true in enumerate(self.y):
            exact, *others = (run[index] for run in runs)
            found.append(own_error_of(true, exact, others).reshape(len(true), -1).max(axis=1))
        return found


def _run(runtime: Runtime, x: Array, true: Sequence[Array], network: SequenceNetwork) -> list[Array]:
    """Runs a model over whole sequences; returns its outputs, each in the shape of Keras's."""
    y, _ = runtime.run(x, np.full(len(x), x.shape[1], np.int32), [])
    outputs = []
    for ours, keras_y, timed in zip(unpack(y), true, network.timed, strict=True):
        if not timed:
            ours = ours.reshape(keras_y.shape) if ours.size == keras_y.size else ours[:, -1]
        outputs.append(ours)
    return outputs


def _name_and_layer(network: SequenceNetwork, index: int) -> tuple[str, str]:
    """The name of an output and of the layer that it comes from."""
    return network.outputs[index].name, keras_private.producer(network.model.outputs[index]).name
