"""How the inputs, or the outputs, of a model lie in one array: plain where there is one tensor, structured for several.

A structured array is sliced, concatenated and padded as a plain one is, so that only what runs a model, and what reads
and writes requests, ever looks into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import TensorSpec

Array = NDArray[Any]


class Layout:
    """One array's layout: `[..., *shape]` in the tensor's type, or, of several tensors, `[...]` with a field for each.

    Args:
        specs: The signature's inputs, or its outputs.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = tuple(specs)
        alone = specs[0] if len(specs) == 1 else None
        self.dtype: np.dtype[Any] = (
            np.dtype(alone.dtype)
            if alone is not None
            else np.dtype([(spec.name, spec.dtype, spec.shape) for spec in specs])
        )
        self.shape: tuple[int, ...] = () if alone is None else alone.shape

    @cached_property
    def frame_dtype(self) -> np.dtype[Any]:
        """The type that inputs have in binary frames: little-endian float32, int32 for all integers."""
        kinds = {spec.name: "<f4" if spec.dtype == "float32" else "<i4" for spec in self.specs}
        if self.dtype.names is None:
            return np.dtype(kinds[self.specs[0].name])
        return np.dtype([(spec.name, kinds[spec.name], spec.shape) for spec in self.specs])

    @property
    def step_bytes(self) -> int:
        """Bytes of one time step."""
        return self.dtype.itemsize * prod(self.shape)

    def zeros(self, *leading: int) -> Array:
        """Gives zeros `[*leading, ...]`."""
        return np.zeros((*leading, *self.shape), self.dtype)

    def join(self, tensors: Sequence[Array]) -> Array:
        """Puts `[*leading, *shape]` of each tensor, in the signature's order, into one array."""
        if len(self.specs) == 1:
            return tensors[0]
        array = np.empty(tensors[0].shape[: tensors[0].ndim - len(self.specs[0].shape)], self.dtype)
        for spec, tensor in zip(self.specs, tensors, strict=True):
            array[spec.name] = tensor
        return array

    def named(self, array: Array) -> Any:
        """Gives what JSON shows of an array: itself, or, of several tensors, an object keyed by their names."""
        if self.dtype.names is None:
            return array
        return {name: array[name].copy() for name in self.dtype.names}  # what is written must be contiguous


def parts(array: Array) -> tuple[Array, ...]:
    """Gives each tensor's view of an array, in the signature's order."""
    names = array.dtype.names
    return (array,) if names is None else tuple(array[name] for name in names)
