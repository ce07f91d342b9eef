"""Tensors on the wire: float32 in JSON without the loss of a bit, integers, and both in safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import ArrayLike, NDArray

from cellserve.errors import UnexpectedAnswer

Array = NDArray[Any]


def float32(values: ArrayLike) -> Array:
    """Makes an array of what a caller gives as a tensor, float32 unless it is of integers."""
    array = np.asarray(values)
    with np.errstate(over="ignore"):  # infinite then, and the server says where
        return array if array.dtype.kind in "iu" else array.astype(np.float32)


def has_integers(tensors: Mapping[str, Array]) -> bool:
    """Says whether a tensor is of integers, as it may be meant or not: 5 may be written for 5.0."""
    return any(tensor.dtype.kind in "iu" for tensor in tensors.values())


def y_of(content: bytes) -> Any:
    """Reads `y` of a JSON document, to the bit: an array, float32 or int64, or a dict of them by their names."""

    def exact() -> Any:
        return json.loads(content, parse_float=Decimal)["y"]

    y = json.loads(content)["y"]
    if isinstance(y, dict):
        return {name: _tensor(values, lambda name=name: exact()[name]) for name, values in y.items()}  # type: ignore[misc]
    return _tensor(y, exact)


def _tensor(values: Any, exact: Callable[[], Any]) -> Array:
    """Makes an array of nested lists of numbers; exact gives them with each float a Decimal.

    The server writes the fewest digits that name a float32. Python reads them as float64, and what lies just beside
    the middle between two float32 may fall on it: then a second rounding may go the wrong way, as it does with
    7.038531e-26.
    """
    wide = np.asarray(values)
    if wide.dtype.kind == "i":  # a float32 is written with a point, or an exponent
        return wide
    near = wide.astype(np.float32)
    with np.errstate(over="ignore"):  # beyond the largest float32 there is no middle
        other = np.nextafter(near, np.where(wide > near, np.inf, -np.inf).astype(np.float32))
    middle = (wide != near) & (wide - near == other - wide)
    if middle.any():
        decimals = np.asarray(exact(), object)
        for place in map(tuple, np.argwhere(middle)):
            digits, double = decimals[place], Decimal(float(wide[place]))
            if digits != double:
                pick = max if digits > double else min
                near[place] = pick(near[place], other[place])
    return near


def tensors_of(content: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    """Reads safetensors: the tensors by name, which may be written to, and the metadata."""
    try:
        tensors = safetensors.numpy.load(content)
        size = int.from_bytes(content[:8], "little")
        metadata: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise UnexpectedAnswer(f"the answer is not in safetensors: {error}: is this Cellserve's URL?") from None
    return tensors, metadata


def body_of(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """Writes safetensors."""
    whole = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    return safetensors.numpy.save(whole, dict(metadata) if metadata else None)
