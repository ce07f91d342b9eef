"""Validates the numbers of one tensor against its specification; errors name the place in the request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import StateSpec, TensorSpec
from cellserve.service.errors import InvalidInput
from cellserve.service.runtime.tensor_layout import TensorLayout

Array = NDArray[Any]

FLOAT32_MAX = float(np.finfo(np.float32).max)
JSON_NAMES = {"int": "an integer", "float": "a number", "str": "a string", "bool": "a boolean", "null": "null",
              "array": "an array", "object": "an object"}  # fmt: skip


def bounds_of(spec: TensorSpec | StateSpec) -> tuple[int, int]:
    """Returns the smallest and the largest integer allowed in a tensor."""
    given = spec.bounds if isinstance(spec, TensorSpec) else None
    if given is not None:
        return given
    limits = np.iinfo(spec.dtype)
    return int(limits.min), int(limits.max)


def validate(array: Array, spec: TensorSpec | StateSpec, place: str, skipped: int = 0) -> Array:
    """Returns an array in a tensor's dtype; raises InvalidInput if a number is not finite or out of bounds.

    Args:
        array: Floating-point for a float32 tensor, otherwise integers.
        spec: The tensor's specification.
        place: The array's place in the request.
        skipped: Leading axes that the request does not have.
    """
    if spec.dtype == "float32":
        bad = None if np.isfinite(array).all() else ~np.isfinite(array)
    else:
        low, high = bounds_of(spec)
        bad = None if not array.size or (array.min() >= low and array.max() <= high) else (array < low) | (array > high)
    if bad is None:
        return array.astype(spec.dtype, copy=False)
    where = tuple(np.argwhere(bad)[0])
    place += brackets(where[skipped:])
    if spec.dtype == "float32":
        raise not_finite(place)
    _out_of_bounds(int(array[where]), spec, place)


def validate_together(array: Array, layout: TensorLayout, place: str) -> Array:
    """Validates all inputs in one array, as `validate` does."""
    if array.dtype.names is None:
        return validate(array, layout.specs[0], place)
    named = ((array[spec.name], spec, f"{place}[{json.dumps(spec.name)}]") for spec in layout.specs)
    return layout.pack([validate(*one) for one in named])


def array_of(values: list[Any], spec: TensorSpec, place: str, single: bool = False) -> Array:
    """Returns `[time, *shape]` of nested lists of numbers; `single` says that the request has no time axis.

    Raises:
        InvalidInput: A list's length or a number is wrong; the error names its place.
    """
    dtype = np.float32 if spec.dtype == "float32" else np.int64
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(values, dtype)
    except OverflowError:
        low, high = bounds_of(spec)
        where, leaf = next(found for found in leaves(values, "") if not low <= found[1] <= high)
        _out_of_bounds(leaf, spec, place + (where.removeprefix("[0]") if single else where))
    except ValueError:
        array = None
    if array is None or array.shape[1:] != spec.shape or not len(array):
        raise _shape_error(values, spec, place, single)
    return validate(array, spec, place, int(single))


def state_of(values: Any, spec: StateSpec, place: str) -> Array:
    """Returns a state `[*shape]` of nested lists of numbers; raises InvalidInput if they are invalid."""
    is_integer = spec.dtype != "float32"
    for where, leaf in leaves(values, place):
        if isinstance(leaf, bool) or not isinstance(leaf, int if is_integer else int | float):
            raise InvalidInput(f"{where}: expected {'an integer' if is_integer else 'a number'}, got {json_name(leaf)}",
                               place=where)  # fmt: skip
        low, high = bounds_of(spec) if is_integer else (-FLOAT32_MAX, FLOAT32_MAX)
        if not low <= leaf <= high:
            if is_integer:
                _out_of_bounds(leaf, spec, where)
            raise not_finite(where)
    try:
        array = np.asarray(values, spec.dtype)
    except ValueError:
        array = np.empty(0, spec.dtype)
    if array.shape != spec.shape:
        raise InvalidInput(f"{place}: expected an array of shape {list(spec.shape)}", place=place)
    return array


def describe_step(spec: TensorSpec) -> str:
    """Returns a description of one time step in JSON: `[5 numbers]`."""
    kind = "number" if spec.dtype == "float32" else "integer"
    if not spec.shape:
        return JSON_NAMES["float" if spec.dtype == "float32" else "int"]
    *axes, last = spec.shape
    return "".join(f"[{axis} times " for axis in axes) + f"[{last} {kind}{'' if last == 1 else 's'}]" + "]" * len(axes)


def leaves(values: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yields all values in nested lists, each with its place."""
    if isinstance(values, list):
        for number, value in enumerate(values):
            yield from leaves(value, f"{place}[{number}]")
    else:
        yield place, values


def brackets(where: tuple[int, ...]) -> str:
    """Returns indices in brackets, `[3][17]`."""
    return "".join(f"[{number}]" for number in where)


def not_finite(place: str) -> InvalidInput:
    """Returns the error for a number that float32 cannot hold."""
    return InvalidInput(f"{place}: not a finite number that float32 can hold", place=place)


def json_name(value: Any) -> str:
    """Returns what a value is in JSON."""
    names = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null", list: "array", dict: "object"}
    return JSON_NAMES[names[type(value)]]


def _out_of_bounds(value: int, spec: TensorSpec | StateSpec, place: str) -> NoReturn:
    low, high = bounds_of(spec)
    raise InvalidInput(
        f"{place}: {value} is out of bounds: send an integer from {low} to {high}", place=place, bounds=[low, high]
    )


def _shape_error(values: list[Any], spec: TensorSpec, place: str, single: bool) -> InvalidInput:
    if not values:
        return InvalidInput(f"{place}: empty: send at least one time step", place=place)
    for step, value in enumerate(values):
        found = _first_wrong_length(value, spec.shape, place if single else f"{place}[{step}]")
        if found:
            where, length, expected = found
            return InvalidInput(
                f"{where}: {length} number{'' if length == 1 else 's'} where the model takes {expected} "
                f"(a time step is {describe_step(spec)})",
                place=where,
            )
    raise AssertionError("called only for lists of a wrong shape")


def _first_wrong_length(value: Any, shape: tuple[int, ...], place: str) -> tuple[str, int, int] | None:
    """Returns the place of the first list of a wrong length, that length, and the right one."""
    if not shape:
        return None
    if len(value) != shape[0]:
        return place, len(value), shape[0]
    for number, inner in enumerate(value):
        found = _first_wrong_length(inner, shape[1:], f"{place}[{number}]")
        if found:
            return found
    return None
