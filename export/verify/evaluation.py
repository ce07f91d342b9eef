"""Test data, `NAME.npz`: reads it, checks it against a network, and scores a model and Keras on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from cellserve.export.errors import ExportError
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.models.scoring import evaluate
from cellserve.service.runtime.batch_invariance import Array
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import TensorLayout, unpack


class TestData:
    """Test sequences and their targets.

    Args:
        network: The network to score.
        path: An .npz with lengths `[n]`, each input `[n, time, *features]`, and targets of at least one output, by
            their names in the signature: `x` and `y` if there is one of each.

    Raises:
        ExportError: There is no such file, or it does not fit the network.
    """

    __test__ = False  # pytest would collect the class by its name

    def __init__(self, network: StatefulNetwork, path: Path) -> None:
        if not path.is_file():
            raise ExportError(f"--data {path}: no such file")
        self.network, self.path = network, path
        inputs, outputs = network.signature.inputs, network.signature.outputs
        try:
            with np.load(path) as file:
                self.arrays: dict[str, Array] = dict(file)
            self.lengths = self.arrays["lengths"].astype(np.int32)
            self.inputs = [np.ascontiguousarray(self.arrays[spec.name].astype(spec.dtype)) for spec in inputs]
        except (OSError, ValueError, KeyError) as error:
            raise self._unfit(error) from None
        for spec, x in zip(inputs, self.inputs, strict=True):
            if x.ndim != 2 + len(spec.shape) or x.shape[2:] != spec.shape or x.shape[:1] != self.lengths.shape:
                raise ExportError(
                    f"{path}: {spec.name} has shape {list(x.shape)} and lengths {list(self.lengths.shape)}, "
                    f"[{', '.join(['n', 'time', *map(str, spec.shape)])}] and [n] are expected"
                )
        times = {x.shape[1] for x in self.inputs}
        if len(times) > 1 or not len(self.lengths) or not 1 <= self.lengths.min() <= self.lengths.max() <= max(times):
            raise ExportError(f"{path}: lengths are expected from 1 to the time steps that every input has")
        if not any(spec.name in self.arrays for spec in outputs):
            raise self._unfit(KeyError(outputs[0].name))

    def score(self, runtime: Runtime) -> dict[str, float]:
        """Scores a model."""
        y, _ = runtime.run(TensorLayout(runtime.signature.inputs).pack(self.inputs), self.lengths, self._zeros(runtime))
        return self._score(unpack(y))

    def score_keras(self, runtime: Runtime) -> dict[str, float]:
        """Scores Keras, starting from zeros as a model does."""
        mask = np.arange(self.inputs[0].shape[1]) < self.lengths[:, None]
        run = tf.function(self.network.run, autograph=False)  # a loop in Python takes minutes for thousands of steps
        tensors = [list(map(tf.constant, arrays)) for arrays in (self.inputs, self._zeros(runtime))]
        outputs, _ = run(*tensors, tf.constant(mask))
        return self._score(list(map(np.asarray, outputs)))

    def _zeros(self, runtime: Runtime) -> list[Array]:
        return runtime.zeros(len(self.lengths))

    def _score(self, outputs: Sequence[Array]) -> dict[str, float]:
        """Scores each output that has a target; with several outputs, metrics carry the output's name."""
        scores: dict[str, float] = {}
        for spec, y in zip(self.network.signature.outputs, outputs, strict=True):
            if spec.name in self.arrays:
                try:
                    scored = evaluate(y, {**self.arrays, "y": self.arrays[spec.name]})
                except (ValueError, KeyError) as error:
                    raise self._unfit(error) from None
                scores.update(
                    {metric if len(outputs) == 1 else f"{spec.name} {metric}": scored[metric] for metric in scored}
                )
        return scores

    def _unfit(self, error: Exception) -> ExportError:
        names = [spec.name for spec in (*self.network.signature.inputs, *self.network.signature.outputs)]
        return ExportError(
            f"{self.path}: not test data ({error}): an .npz with lengths, {', '.join(names[:-1])} and {names[-1]} "
            f"is expected"
        )
