"""Random inputs within a model's signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellserve.tensors import Array

_DIGITS = 4  # after the point, as a client would send them


@dataclass(frozen=True, slots=True)
class Input:
    """One input: its name, type, the shape of a time step, and the bounds of integers."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    low: int = 0
    high: int = 1  # allowed too

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Input:
        """Reads an input of the signature in `GET /models/{name}`."""
        low, high = document["bounds"] or (0, 1)
        return cls(document["name"], np.dtype(document["dtype"]), tuple(document["shape"]), low, high)

    def draw(self, rng: np.random.Generator, *leading: int) -> Array:
        """Returns random values `[*leading, *shape]`: normal numbers in float64, or integers between the bounds."""
        shape = (*leading, *self.shape)
        if self.dtype.kind == "f":
            return np.asarray(np.round(rng.standard_normal(shape), _DIGITS))
        return rng.integers(self.low, self.high, shape, np.int64, endpoint=True).astype(self.dtype)


def draw_all(inputs: Sequence[Input], rng: np.random.Generator, *leading: int) -> Any:
    """Returns random values of one input, or a dict of them by name."""
    if len(inputs) == 1:
        return inputs[0].draw(rng, *leading)
    return {one.name: one.draw(rng, *leading) for one in inputs}


def as_json(drawn: Any) -> Any:
    """Returns what was drawn as nested lists, with the few digits that it was drawn with."""
    if isinstance(drawn, Mapping):
        return {name: array.tolist() for name, array in drawn.items()}
    return drawn.tolist()
