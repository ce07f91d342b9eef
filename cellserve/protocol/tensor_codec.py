"""Tensors on the wire: JSON read without losing a bit of a float32, and safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from cellserve.errors import UnexpectedAnswer
from cellserve.tensors import Array


def read_y(content: bytes) -> Any:
    """Reads `y` from a JSON document, bit for bit: a float32 or int64 array, or a dict of arrays by name."""

    def exact() -> Any:
        return json.loads(content, parse_float=Decimal)["y"]

    y = json.loads(content)["y"]
    if isinstance(y, dict):
        return {name: _tensor(values, lambda name=name: exact()[name]) for name, values in y.items()}  # type: ignore[misc]
    return _tensor(y, exact)


def _tensor(values: Any, exact: Callable[[], Any]) -> Array:
    """Returns an array of nested lists of numbers; `exact` returns the same lists with a Decimal for each float.

    The server writes the shortest digits that identify a float32. Python reads them as float64, which may round a
    number next to the midpoint of two float32 onto that midpoint. Rounding again to float32 can then pick the wrong
    neighbour, as it does with 7.038531e-26.
    """
    wide = np.asarray(values)
    if wide.dtype.kind == "i":  # floats are written with a point or an exponent
        return wide
    near = wide.astype(np.float32)
    with np.errstate(over="ignore"):  # beyond the largest float32 there is no midpoint
        other = np.nextafter(near, np.where(wide > near, np.inf, -np.inf).astype(np.float32))
    midpoint = (wide != near) & (wide - near == other - wide)
    if midpoint.any():
        decimals = np.asarray(exact(), object)
        for place in map(tuple, np.argwhere(midpoint)):
            digits, double = decimals[place], Decimal(float(wide[place]))
            if digits != double:
                pick = max if digits > double else min
                near[place] = pick(near[place], other[place])
    return near


def read_safetensors(content: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    """Reads safetensors: writable tensors by name, and the metadata."""
    try:
        tensors = safetensors.numpy.load(content)
        size = int.from_bytes(content[:8], "little")
        metadata: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise UnexpectedAnswer(f"the answer is not in safetensors: {error}: is this the URL of Cellserve?") from None
    return tensors, metadata


def write_safetensors(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns tensors as safetensors."""
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    return safetensors.numpy.save(contiguous, dict(metadata) if metadata else None)
