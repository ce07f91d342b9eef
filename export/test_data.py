"""Test data, `NAME.npz`: read, checked against a network, and what a model and Keras score on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from export.errors import ExportError
from export.stateful import StatefulNetwork
from models.metrics import evaluate
from service.exactness import Array
from service.runtime import Runtime


class TestData:
    """Sequences and what is wanted of them.

    Args:
        network: Which they are for.
        path: An .npz with x `[n, time, *features]`, lengths `[n]` and y.

    Raises:
        ExportError: There is no such file, or it does not fit the network.
    """

    __test__ = False  # it is no test of pytest's

    def __init__(self, network: StatefulNetwork, path: Path) -> None:
        if not path.is_file():
            raise ExportError(f"--data {path}: no such file")
        if len(network.inputs) > 1 or len(network.outputs) > 1:
            raise ExportError(f"{path}: test data is scored for networks of one input and one output: leave --data out")
        spec = network.inputs[0]
        try:
            with np.load(path) as file:
                self.arrays: dict[str, Array] = dict(file)
            x, lengths = self.arrays["x"].astype(spec.dtype), self.arrays["lengths"].astype(np.int32)
        except (OSError, ValueError, KeyError) as error:
            raise ExportError(f"{path}: not test data ({error}): an .npz with x, lengths and y is wanted") from None
        if x.shape[2:] != spec.shape or x.shape[:1] != lengths.shape:
            raise ExportError(
                f"{path}: x has shape {list(x.shape)} and lengths {list(lengths.shape)}, "
                f"[n, time, {', '.join(map(str, spec.shape))}] and [n] are wanted"
            )
        self.network, self.path = network, path
        self.x, self.lengths = np.ascontiguousarray(x), lengths

    def score(self, runtime: Runtime) -> dict[str, float]:
        """Scores a model."""
        y, _ = runtime.run(self.x, self.lengths, runtime.zeros(len(self.x)))
        return self._score(y)

    def score_keras(self, runtime: Runtime) -> dict[str, float]:
        """Scores Keras, from the zeros that a model begins with."""
        mask = np.arange(self.x.shape[1]) < self.lengths[:, None]
        (y,), _ = self.network.run([self.x], runtime.zeros(len(self.x)), mask)
        return self._score(np.asarray(y))

    def _score(self, y: Array) -> dict[str, float]:
        try:
            return evaluate(y, self.arrays)
        except (ValueError, KeyError) as error:
            raise ExportError(
                f"{self.path}: not test data ({error}): an .npz with x, lengths and y is wanted"
            ) from None
