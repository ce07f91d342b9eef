"""Samples the next symbol from a model's output: a pure function of the output, a seed and a position."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellserve.service.errors import ModelFailed

Array = NDArray[Any]


class Sampling(NamedTuple):
    """How symbols are sampled."""

    temperature: float = 1.0  # below 1, probable symbols become more frequent; 0 always takes the most probable one
    top_k: int | None = None  # sample only among the k most probable symbols
    seed: int = 0


def sample(output: Array, logits: bool, sampling: Sampling, position: int) -> int:
    """Samples the index of a symbol.

    It is the symbol at which the cumulative weight, summed in order in float64, passes a random fraction of the total.

    Args:
        output: `[symbols]`, probabilities or logits.
        logits: Whether they are logits.
        sampling: Temperature, top k and seed.
        position: The session's position after the step; each sample of a session has a position of its own.

    Raises:
        ModelFailed: The output is not a distribution.
    """
    given = output.astype(np.float64)
    largest = given.max()
    if not logits and not largest > 0:
        raise ModelFailed("the model's probabilities are all zero, so no symbol can be sampled; nothing was applied")
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
    index = int(np.searchsorted(sums, uniform(sampling.seed, position) * sums[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))  # the product may be rounded up to the total


def uniform(seed: int, position: int) -> float:
    """Returns a random number in [0, 1): the first 53 bits of Philox4x64-10 with this key and counter.

    Source: J. Salmon, M. Moraes, R. Dror, D. Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC11 (2011). NumPy's
    generator increments the counter before the first number.
    """
    return float(int(np.random.Philox(key=seed, counter=position).random_raw()) >> 11) * 2.0**-53
