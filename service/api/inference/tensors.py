"""The protocol's tensors: datatypes, and arrays from bytes or numbers; errors name the tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import TensorSpec
from cellserve.service.errors import InvalidInput, excerpt
from cellserve.service.validation.json_input import decode, depth_of

Array = NDArray[Any]

# The supported ones of https://kserve.github.io/website, "Open Inference Protocol", "Tensor Data Types".
DATATYPES = {"float32": "FP32", "int32": "INT32", "int64": "INT64"}
_WIRE: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8")}
_MOST_AXES = 8
_LARGEST_EMPTY = 2**31  # product of the other axes of an empty tensor


def _nested(number: Any) -> list[msgspec.json.Decoder[Any]]:
    types = [number]
    for _ in range(_MOST_AXES):
        types.append(list[types[-1]])  # type: ignore[valid-type]
    return [msgspec.json.Decoder(kind) for kind in types[1:]]


_FLOATS, _INTEGERS = _nested(float), _nested(int)


def from_bytes(name: str, datatype: str, shape: Sequence[int], content: bytes | memoryview) -> Array:
    """Returns an array of row-major little-endian bytes.

    Raises:
        InvalidInput: The datatype is not supported, or the shape needs another number of bytes.
    """
    dtype = _dtype(name, datatype)
    size = _size(name, shape) * dtype.itemsize
    if len(content) != size:
        raise InvalidInput(
            f"{name}: {len(content)} bytes, where the shape {_told(shape)} of {datatype} asks for {_told(size)}",
            place=name,
        )
    return np.frombuffer(content, dtype).reshape(shape)


def from_numbers(name: str, datatype: str, shape: Sequence[int], numbers: Any) -> Array:
    """Returns an array of numbers, flat and row-major or nested; raises InvalidInput as `from_bytes` does."""
    dtype = _dtype(name, datatype)
    size = _size(name, shape)
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(numbers, dtype)
    except (ValueError, OverflowError):
        raise InvalidInput(f"{name}: send data of {datatype}, flat or nested evenly", place=name) from None
    if array.size != size:
        raise InvalidInput(
            f"{name}: {array.size} numbers, where the shape {_told(shape)} asks for {_told(size)}", place=name
        )
    return array.reshape(shape)


def from_json(name: str, datatype: str, shape: Sequence[int], data: msgspec.Raw) -> Array:
    """Returns an array of JSON numbers; raises InvalidInput as `from_bytes` does."""
    decoders = _FLOATS if _dtype(name, datatype).kind == "f" else _INTEGERS
    depth = depth_of(data)
    if depth > _MOST_AXES:
        raise InvalidInput(f"{name}: its data is nested too deeply: send it flat", place=name)
    return from_numbers(name, datatype, shape, decode(decoders[max(depth, 1) - 1], data, name))


def check_datatype(name: str, datatype: str, specs: Sequence[TensorSpec]) -> None:
    """Raises InvalidInput if a tensor is a model's input and has another datatype than that."""
    for spec in specs:
        if spec.name == name and DATATYPES[spec.dtype] != datatype:
            raise InvalidInput(
                f"{name}: its datatype is {excerpt(datatype, 40)!r}: send {DATATYPES[spec.dtype]}, the model's",
                place=name,
            )


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    dtype = _WIRE.get(datatype)
    if dtype is None:
        raise InvalidInput(
            f"{name}: its datatype is {excerpt(datatype, 40)!r}: send one of {', '.join(_WIRE)}", place=name
        )
    return dtype


def _told(number: int | Sequence[int]) -> str:
    return excerpt(str(number if isinstance(number, int) else list(number)))


def _size(name: str, shape: Sequence[int]) -> int:
    # NumPy refuses large axes beside one of 0; other large shapes do not fit their data.
    is_huge = 0 in shape and math.prod(axis or 1 for axis in shape) > _LARGEST_EMPTY
    if len(shape) > _MOST_AXES or min(shape, default=0) < 0 or is_huge:
        raise InvalidInput(f"{name}: its shape is {_told(shape[:_MOST_AXES])}: send the shape of the data", place=name)
    return math.prod(shape)
