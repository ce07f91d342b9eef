"""Keras's results for whole sequences, to compare a network that reads whole sequences with."""

from __future__ import annotations

import numpy as np

from cellserve.export.keras_model import keras_private
from cellserve.export.onnx_graph.sequence_network import SequenceNetwork
from cellserve.export.verify.keras_runs import run_saved_model, run_saved_model_in_double
from cellserve.export.verify.parity import (
    KERAS_FLOAT32_ERROR_FACTOR,
    TOLERANCE,
    Difference,
    Parity,
    relative_error,
)
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

    def compare(self, runtime: Runtime, allow_float32_error: bool = True) -> Parity:
        """Runs a model over the sequences of each length, and measures every output."""
        differences, float32_error = [], 0.0
        by_length: dict[int, float] = {}
        for x, true in self.cases:
            lengths = np.full(len(x), x.shape[1], np.int32)
            y, _ = runtime.run(x, lengths, [])
            for index, output in enumerate(unpack(y)):
                ours, keras_y = output.astype(np.float64), true[index].astype(np.float64)
                if not self.network.timed[index]:
                    ours = ours.reshape(keras_y.shape) if ours.size == keras_y.size else ours[:, -1]
                worst, allowed = float(relative_error(ours, keras_y).max()), TOLERANCE
                by_length[x.shape[1]] = max(worst, by_length.get(x.shape[1], 0.0))
                if allow_float32_error and worst > TOLERANCE:
                    float32_error = max(float32_error, self._keras_float32_error(x, index, keras_y))
                    allowed = max(TOLERANCE, KERAS_FLOAT32_ERROR_FACTOR * float32_error)
                spec = self.network.outputs[index]
                layer = keras_private.producer(self.network.model.outputs[index]).name
                where = f"{x.shape[1]} time steps"
                differences.append(Difference(spec.name, layer, "model", worst, worst / allowed, where))
        rows, time = self.cases[-1][0].shape[:2]
        return Parity(tuple(differences), float32_error, rows, time, tuple(by_length.items()), 0)

    def _keras_float32_error(self, x: Array, index: int, single: Array) -> float:
        """Float32 Keras's own error of one output against a float64 run."""
        exact = run_saved_model_in_double(self.network.original, unpack(x))
        return 0.0 if exact is None else float(relative_error(single, exact[index]).max())
