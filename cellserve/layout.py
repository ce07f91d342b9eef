"""How the inputs, or the outputs, of a model lie in one array, as they do in a binary frame (docs/protocol.md).

Plain where there is one tensor; structured, with a field for each, where there are several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from cellserve.numbers import Array, float32

Given: TypeAlias = ArrayLike | Mapping[str, ArrayLike]  # of several inputs, each by its name
Tensors: TypeAlias = Any  # an Array; of several outputs dict[str, Array], each by its name
Outputs: TypeAlias = Literal["last", "all"]
_FRAME_BOUNDS = np.iinfo(np.int32)


class Tensor(NamedTuple):
    """One input or output; its shape is that of a time step."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Layout:
    """One array's layout: `[..., *shape]` in the tensor's type, or, of several tensors, `[...]` with a field for each.

    Args:
        tensors: In the signature's order, in the types of a frame.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)
        alone = self.tensors[0] if len(self.tensors) == 1 else None
        self.dtype: np.dtype[Any] = np.dtype(list(map(tuple, tensors))) if alone is None else alone.dtype
        self.shape: tuple[int, ...] = () if alone is None else alone.shape

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return [tensor.name for tensor in self.tensors]

    def zeros(self, *leading: int) -> Array:
        """Gives zeros `[*leading, ...]`."""
        return np.zeros((*leading, *self.shape), self.dtype)

    def named(self, array: Array) -> Tensors:
        """Gives an array itself, or a dict of what several tensors have in it."""
        if self.dtype.names is None:
            return array
        return {name: array[name].copy() for name in self.dtype.names}

    def typed(self, y: Tensors) -> Tensors:
        """Gives an array, or a dict of them, in the tensors' types."""
        if not isinstance(y, dict):
            return y.astype(self.dtype, copy=False)
        return {tensor.name: y[tensor.name].astype(tensor.dtype, copy=False) for tensor in self.tensors}

    def batched(self, x: Given, count: int) -> tuple[Array, bool]:
        """Makes one array `[count, time, ...]` of what a caller gives for so many sessions.

        Returns:
            The array, and whether there was no time axis, of one time step.

        Raises:
            ValueError: It does not fit.
        """
        several = self.dtype.names is not None
        if isinstance(x, Mapping) != several or (isinstance(x, Mapping) and x.keys() != set(self.names)):
            wanted = f"a dict of {', '.join(self.names)}" if several else "an array"
            raise ValueError(f"x: {sorted(x) if isinstance(x, Mapping) else 'an array'}: the model takes {wanted}")
        read = {
            tensor.name: _batched(x[tensor.name], tensor, count, f"x[{tensor.name!r}]")
            if isinstance(x, Mapping)
            else _batched(x, tensor, count, "x")
            for tensor in self.tensors
        }
        times = {name: "none" if single else array.shape[1] for name, (array, single) in read.items()}
        if len(set(times.values())) > 1:
            raise ValueError(f"x: the inputs differ in time steps ({times}): give as many of each")
        array, single = read[self.names[0]]
        if several:
            array = np.empty(array.shape[:2], self.dtype)
            for name, (one, _) in read.items():
                array[name] = one
        return array, single


def _batched(values: ArrayLike, tensor: Tensor, count: int, place: str) -> tuple[Array, bool]:
    array = float32(values)
    axes = array.ndim - len(tensor.shape)
    if axes not in (1, 2) or array.shape[axes:] != tensor.shape or len(array) != count or not array.size:
        step = "".join(f", {size}" for size in tensor.shape)
        wanted = f"[{count}{step}] or [{count}, time{step}]"
        raise ValueError(f"{place}: its shape is {list(array.shape)}: give {wanted} for {count} sessions")
    if tensor.dtype.kind == "i":
        if array.dtype.kind == "f":
            raise ValueError(f"{place}: of floating-point numbers: the model takes integers")
        for value in (array.min(), array.max()):
            if not _FRAME_BOUNDS.min <= value <= _FRAME_BOUNDS.max:
                raise ValueError(f"{place}: {value} is out of bounds: a frame holds integers of 32 bits")
    array = array.astype(tensor.dtype, copy=False)
    return (array[:, None], True) if axes == 1 else (array, False)


def listed(tensors: Given) -> Any:
    """Gives what JSON has of an array, or of a dict of them."""
    if isinstance(tensors, Mapping):
        return {name: float32(tensor).tolist() for name, tensor in tensors.items()}
    return float32(tensors).tolist()
