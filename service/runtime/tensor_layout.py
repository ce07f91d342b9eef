"""The layout of a model's inputs, or outputs, in one array: plain for one tensor, structured for several.

A structured array is sliced, concatenated and padded like a plain one. Only the code that runs models, and the code
that reads and writes requests, looks inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import StateSpec, TensorSpec

Array = NDArray[Any]

_JSON_BYTES = {"float32": 17, "int32": 12, "int64": 21}  # of a number at its longest, with a comma


class TensorLayout:
    """The layout of one array: `[..., *shape]` for one tensor, or `[...]` with a field for each of several tensors.

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
        """The dtype of inputs in binary frames: little-endian float32, and int32 for all integers."""
        kinds = {spec.name: "<f4" if spec.dtype == "float32" else "<i4" for spec in self.specs}
        if self.dtype.names is None:
            return np.dtype(kinds[self.specs[0].name])
        return np.dtype([(spec.name, kinds[spec.name], spec.shape) for spec in self.specs])

    @property
    def step_bytes(self) -> int:
        """Bytes of one time step."""
        return self.dtype.itemsize * prod(self.shape)

    @cached_property
    def json_bytes(self) -> int:
        """Bytes of one time step in JSON, at most."""
        return sum(map(json_bytes, self.specs))

    def zeros(self, *leading: int) -> Array:
        """Returns zeros `[*leading, ...]`."""
        return np.zeros((*leading, *self.shape), self.dtype)

    def pack(self, tensors: Sequence[Array]) -> Array:
        """Packs one `[*leading, *shape]` per tensor, in the signature's order, into one array."""
        if len(self.specs) == 1:
            return tensors[0]
        array = np.empty(tensors[0].shape[: tensors[0].ndim - len(self.specs[0].shape)], self.dtype)
        for spec, tensor in zip(self.specs, tensors, strict=True):
            array[spec.name] = tensor
        return array

    def to_json(self, array: Array) -> Any:
        """Returns the JSON form: the array, or {name: array} for several tensors."""
        if self.dtype.names is None:
            return array
        return {name: array[name].copy() for name in self.dtype.names}  # orjson needs contiguous arrays


def json_bytes(spec: TensorSpec | StateSpec) -> int:
    """Returns the bytes of one time step of a tensor, or of one session's state, in JSON, at most."""
    brackets = 3 * sum(prod(spec.shape[:axis]) for axis in range(len(spec.shape) + 1))
    return prod(spec.shape) * _JSON_BYTES[spec.dtype] + brackets


def unpack(array: Array) -> tuple[Array, ...]:
    """Returns a view of each tensor in an array, in the signature's order."""
    names = array.dtype.names
    return (array,) if names is None else tuple(array[name] for name in names)
