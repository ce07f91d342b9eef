"""Draws the next symbol from what a model says of it: a pure function of that, a seed and a position."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellserve.service.errors import ModelFailed

Array = NDArray[Any]


class Sampling(NamedTuple):
    """How symbols are drawn."""

    temperature: float = 1.0  # below 1 the probable ones more often, 0 the most probable one always
    top_k: int | None = None  # of so many, the most probable ones
    seed: int = 0


def draw(output: Array, logits: bool, sampling: Sampling, position: int) -> int:
    """Draws the place of a symbol.

    It is found where the sum of the symbols' weights, taken in their order in float64, passes a share of the whole.

    Args:
        output: `[symbols]`, probabilities, or logits.
        logits: Which of the two.
        sampling: How.
        position: Of the session that has given the output; no two draws of a session are at one.

    Raises:
        ModelFailed: The output is no distribution.
    """
    given = output.astype(np.float64)
    largest = given.max()
    if not logits and not largest > 0:
        raise ModelFailed("the model's probabilities are all zero: no symbol can be drawn, nothing was applied")
    if sampling.temperature == 0:
        return int(given.argmax())
    with np.errstate(over="ignore", under="ignore"):
        if logits:
            weights = np.exp((given - largest) / sampling.temperature)
        else:
            weights = np.maximum(given, 0) / largest
            if sampling.temperature != 1:
                weights **= 1 / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(weights):
        weights[np.argsort(-given, kind="stable")[sampling.top_k :]] = 0
    sums = np.cumsum(weights)
    place = int(np.searchsorted(sums, share(sampling.seed, position) * sums[-1], side="right"))
    return min(place, int(np.flatnonzero(weights)[-1]))  # a product may be rounded up to the whole


def share(seed: int, position: int) -> float:
    """Gives a number from 0 to 1 (1 excluded), the first 53 bits of Philox4x64-10 with this key and counter.

    Source: J. Salmon, M. Moraes, R. Dror, D. Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC11 (2011); NumPy's
    generator, which counts up before it draws.
    """
    return float(int(np.random.Philox(key=seed, counter=position).random_raw()) >> 11) * 2.0**-53
