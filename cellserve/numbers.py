"""Tensors on the wire: float32 in JSON without the loss of a bit, and in safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def y_of(content: bytes) -> Array:
    """Reads `y` of a JSON document, to the bit.

    The server writes the fewest digits that name a float32. Python reads them as float64, and what lies just beside
    the middle between two float32 may fall on it: then a second rounding may go the wrong way, as it does with
    7.038531e-26.
    """
    wide = np.asarray(json.loads(content)["y"], np.float64)
    near = wide.astype(np.float32)
    with np.errstate(over="ignore"):  # beyond the largest float32 there is no middle
        other = np.nextafter(near, np.where(wide > near, np.inf, -np.inf).astype(np.float32))
    middle = (wide != near) & (wide - near == other - wide)
    if middle.any():
        exact = np.asarray(json.loads(content, parse_float=Decimal)["y"], object)
        for place in map(tuple, np.argwhere(middle)):
            digits, double = exact[place], Decimal(float(wide[place]))
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
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return safetensors.numpy.save(whole, dict(metadata) if metadata else None)
