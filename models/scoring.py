"""Scores predictions: accuracy, RMSE and bits, as in `cellserve train` and model files. Needs no TensorFlow."""

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
            time steps where there is none); or integers `[n, time]`, the class of every time step, of which the output
            gives the probabilities.

    Returns:
        `{"accuracy": share}` for a class of each sequence, `{"rmse": error in the unit of y}` for numbers,
        `{"bits": mean of -log2(the probability of what came)}` for classes of every time step.

    Raises:
        ValueError: `y` has neither form.
    """
    y, lengths = data["y"], data["lengths"]
    if y.ndim == 1 and np.issubdtype(y.dtype, np.integer):
        last = y_pred[np.arange(len(y)), lengths - 1]
        return {"accuracy": float(np.mean(last.argmax(axis=-1) == y))}
    valid = np.arange(y_pred.shape[1]) < lengths[:, None]
    if y.shape == y_pred.shape[:2] == y_pred.shape[:-1] and np.issubdtype(y.dtype, np.integer):
        given = np.take_along_axis(y_pred, y[..., None], axis=-1)[..., 0][valid]
        return {"bits": bits_per_symbol(given)}
    if y.shape != y_pred.shape:
        raise ValueError(
            f"y has shape {list(y.shape)}: integers [{len(y_pred)}] or {list(y_pred.shape[:2])} (classes) or numbers "
            f"{list(y_pred.shape)} (wanted outputs) can be scored"
        )
    judged = valid
    if "weight" in data:
        judged &= data["weight"] != 0
    return {"rmse": rmse(y_pred[judged], y[judged])}


def rmse(predicted: Array, wanted: Array) -> float:
    """Root of the mean squared difference, in the unit of the data."""
    return float(np.sqrt(np.mean(np.square(predicted.astype(np.float64) - wanted))))


def bits_per_symbol(probabilities: Array) -> float:
    """Mean negative log2 likelihood per symbol, from the probability predicted for each symbol that came."""
    return float(-np.mean(np.log2(np.maximum(probabilities.astype(np.float64), np.finfo(np.float64).tiny))))


def ngram_bits_per_symbol(train: Array, test: Array, symbols: int, order: int = 5) -> float:
    """N-gram baseline in bits per symbol: a text predicted by the n-grams of another.

    Args:
        train: `[n]`, symbols to count n-grams in.
        test: `[m]`, symbols to predict, from the second on.
        symbols: Number of different symbols.
        order: Length of the longest n-grams; shorter ones are mixed in as I. Witten and T. Bell do (The zero-frequency
            problem, IEEE Transactions on Information Theory 37 (1991), method C).
    """
    seen, told = train.tolist(), test.tolist()
    counts: dict[tuple[int, ...], Array] = {}
    for place in range(len(seen)):
        for length in range(min(order, place + 1)):
            counts.setdefault(tuple(seen[place - length : place]), np.zeros(symbols))[seen[place]] += 1
    given = []
    for place in range(1, len(told)):
        mixed: Array = np.full(symbols, 1 / symbols)
        for length in range(min(order, place + 1)):
            after = counts.get(tuple(told[place - length : place]))
            if after is None:
                break
            kinds = np.count_nonzero(after)
            mixed = (after + kinds * mixed) / (after.sum() + kinds)
        given.append(mixed[told[place]])
    return bits_per_symbol(np.array(given))
