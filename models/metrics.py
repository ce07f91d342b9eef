"""Scores predictions: what `cellserve train` and the model file mean by accuracy and RMSE. Needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def evaluate(y_pred: Array, data: Mapping[str, Array]) -> dict[str, float]:
    """Scores a model's outputs on test data.

    Args:
        y_pred: `[n, time, *outputs]`, the output after every time step.
        data: `lengths [n]`, and `y`: integers `[n]`, the class of each sequence, judged by its last output; or numbers
            `[n, time, *outputs]`, wanted after every time step, judged where `weight [n, time]` is not zero (all valid
            time steps where there is none).

    Returns:
        `{"accuracy": share}` for classes, `{"rmse": error in the unit of y}` for numbers.

    Raises:
        ValueError: `y` has neither form.
    """
    y, lengths = data["y"], data["lengths"]
    if y.ndim == 1 and np.issubdtype(y.dtype, np.integer):
        last = y_pred[np.arange(len(y)), lengths - 1]
        return {"accuracy": float(np.mean(last.argmax(axis=-1) == y))}
    if y.shape != y_pred.shape:
        raise ValueError(
            f"y has shape {list(y.shape)}: integers [{len(y_pred)}] (classes) or numbers "
            f"{list(y_pred.shape)} (wanted outputs) can be scored"
        )
    judged = np.arange(y.shape[1]) < lengths[:, None]
    if "weight" in data:
        judged &= data["weight"] != 0
    return {"rmse": rmse(y_pred[judged], y[judged])}


def rmse(predicted: Array, wanted: Array) -> float:
    """Gives the root of the mean squared difference, in the unit of both."""
    return float(np.sqrt(np.mean(np.square(predicted.astype(np.float64) - wanted))))
