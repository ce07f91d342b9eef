"""Arrays as callers give and get them, and how several tensors share one array in a binary frame.

docs/reference/protocol.md has the frame's layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[Any]
States: TypeAlias = Mapping[str, ArrayLike]  # {name: [*shape]}
TensorLike: TypeAlias = ArrayLike | Mapping[str, ArrayLike]  # several inputs: a dict by name
Tensors: TypeAlias = Any  # one output: an Array; several: dict[str, Array]
Outputs: TypeAlias = Literal["last", "all"]
_FRAME_BOUNDS = np.iinfo(np.int32)


class TensorSpec(NamedTuple):
    """The name, type and shape per time step of one input or output."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class FrameLayout:
    """How a model's inputs, or its outputs, lie in one array.

    One tensor: `[..., *shape]` in its own type. Several: a structured array `[...]` with a field for each.

    Args:
        tensors: In the signature's order, in the types that a frame has.
    """

    def __init__(self, tensors: Sequence[TensorSpec]) -> None:
        self.tensors = tuple(tensors)
        alone = self.tensors[0] if len(self.tensors) == 1 else None
        self.dtype: np.dtype[Any] = np.dtype(list(map(tuple, tensors))) if alone is None else alone.dtype
        self.shape: tuple[int, ...] = () if alone is None else alone.shape

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return [tensor.name for tensor in self.tensors]

    def zeros(self, *leading: int) -> Array:
        """Returns zeros `[*leading, ...]`."""
        return np.zeros((*leading, *self.shape), self.dtype)

    def unpack(self, array: Array) -> Tensors:
        """Returns the array itself for one tensor, a dict of arrays by name for several."""
        if self.dtype.names is None:
            return array
        return {name: array[name].copy() for name in self.dtype.names}

    def cast(self, y: Tensors) -> Tensors:
        """Casts one array, or a dict of them, to the tensors' types."""
        if not isinstance(y, dict):
            return y.astype(self.dtype, copy=False)
        return {tensor.name: y[tensor.name].astype(tensor.dtype, copy=False) for tensor in self.tensors}

    def pack(self, x: TensorLike, count: int) -> tuple[Array, bool]:
        """Packs the inputs of `count` sessions into one array `[count, time, ...]`.

        Returns:
            The array, and whether x had no time axis (a single time step).

        Raises:
            ValueError: x does not fit the layout.
        """
        several = self.dtype.names is not None
        if isinstance(x, Mapping) != several or (isinstance(x, Mapping) and x.keys() != set(self.names)):
            wanted = f"a dict of {', '.join(self.names)}" if several else "an array"
            raise ValueError(f"x: {sorted(x) if isinstance(x, Mapping) else 'an array'}: the model takes {wanted}")
        read = {
            tensor.name: _with_time_axis(x[tensor.name], tensor, count, f"x[{tensor.name!r}]")
            if isinstance(x, Mapping)
            else _with_time_axis(x, tensor, count, "x")
            for tensor in self.tensors
        }
        times = {name: "none" if single else array.shape[1] for name, (array, single) in read.items()}
        if len(set(times.values())) > 1:
            raise ValueError(f"x: the inputs differ in time steps ({times}): give the same number for each")
        array, single = read[self.names[0]]
        if several:
            array = np.empty(array.shape[:2], self.dtype)
            for name, (one, _) in read.items():
                array[name] = one
        return array, single


def to_tensor(values: ArrayLike) -> Array:
    """Converts to an array: integers stay integers, everything else becomes float32."""
    array = np.asarray(values)
    with np.errstate(over="ignore"):  # becomes infinite, and the server's answer says where
        return array if array.dtype.kind in "iu" else array.astype(np.float32)


def to_json(tensors: TensorLike) -> Any:
    """Converts an array, or a dict of arrays, to nested lists."""
    if isinstance(tensors, Mapping):
        return {name: to_tensor(tensor).tolist() for name, tensor in tensors.items()}
    return to_tensor(tensors).tolist()


def has_integers(tensors: Mapping[str, Array]) -> bool:
    """Whether any tensor holds integers, which a caller may have meant as floats (5 for 5.0)."""
    return any(tensor.dtype.kind in "iu" for tensor in tensors.values())


def add_session_axis(x: TensorLike) -> TensorLike:
    """Adds a leading axis of length one to x."""
    if isinstance(x, Mapping):
        return {name: np.asarray(tensor)[None] for name, tensor in x.items()}
    return np.asarray(x)[None]


def drop_session_axis(y: Tensors) -> Tensors:
    """Removes the leading axis of length one from y."""
    return {name: tensor[0, ...] for name, tensor in y.items()} if isinstance(y, dict) else y[0, ...]


def _with_time_axis(values: ArrayLike, tensor: TensorSpec, count: int, place: str) -> tuple[Array, bool]:
    array = to_tensor(values)
    axes = array.ndim - len(tensor.shape)
    if axes not in (1, 2) or array.shape[axes:] != tensor.shape or len(array) != count or not array.size:
        step = "".join(f", {size}" for size in tensor.shape)
        wanted = f"[{count}{step}] or [{count}, time{step}]"
        raise ValueError(f"{place}: its shape is {list(array.shape)}: give {wanted} for {count} sessions")
    if tensor.dtype.kind == "i":
        if array.dtype.kind == "f":
            raise ValueError(f"{place}: has floating-point numbers, but the model takes integers")
        for value in (array.min(), array.max()):
            if not _FRAME_BOUNDS.min <= value <= _FRAME_BOUNDS.max:
                raise ValueError(f"{place}: {value} is out of bounds: a frame holds 32-bit integers")
    array = array.astype(tensor.dtype, copy=False)
    return (array[:, None], True) if axes == 1 else (array, False)
