"""Validates the numbers of one tensor against its specification; errors name the place in the request."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import StateSpec, TensorSpec
from cellserve.service.errors import InvalidInput, excerpt
from cellserve.service.runtime.tensor_layout import TensorLayout

Array = NDArray[Any]

_INT64 = np.iinfo(np.int64)
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


def validate(array: Array, spec: TensorSpec | StateSpec, place: str) -> Array:
    """Returns an array in a tensor's dtype; raises InvalidInput if a number is not finite or out of bounds.

    Args:
        array: Floating-point for a float32 tensor, otherwise integers.
        spec: The tensor's specification.
        place: The array's place in the request.
    """
    where = _first_invalid(array, spec)
    if where is not None:
        _refuse(array[where], spec, place + brackets(where))
    return array.astype(spec.dtype, copy=False)


def validate_together(array: Array, layout: TensorLayout, place: str) -> Array:
    """Validates all inputs in one array, as `validate` does."""
    if array.dtype.names is None:
        return validate(array, layout.specs[0], place)
    named = ((array[spec.name], spec, f"{place}[{json.dumps(spec.name)}]") for spec in layout.specs)
    return layout.pack([validate(*one) for one in named])


def array_of(steps: list[Any], spec: TensorSpec, name_step: Callable[[int], str]) -> Array:
    """Returns `[time, *shape]` of time steps in nested lists of numbers.

    Args:
        steps: At least one, their nesting and the kinds of their numbers right.
        spec: The tensor's specification.
        name_step: Returns the place of a time step in the request, by its number.

    Raises:
        InvalidInput: A list's length or a number is wrong; the error names its place.
    """
    dtype = np.float32 if spec.dtype == "float32" else np.int64
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(steps, dtype)
    except (OverflowError, ValueError):
        array = None
    if array is None or array.shape[1:] != spec.shape:
        _refuse_steps(steps, spec, name_step)
    where = _first_invalid(array, spec)
    if where is not None:
        _refuse(array[where], spec, name_step(where[0]) + brackets(where[1:]))
    return array.astype(spec.dtype, copy=False)


def state_of(values: Any, spec: StateSpec, place: str) -> Array:
    """Returns a state `[*shape]` of nested lists of numbers, of the right depth; raises InvalidInput as `array_of`."""
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(values, np.float32 if spec.dtype == "float32" else np.int64)
    except (OverflowError, ValueError):
        array = None
    if array is None or array.shape != spec.shape:
        if _first_wrong_length(values, spec.shape) is None:
            _refuse_large([values], spec, lambda _: place)
        raise InvalidInput(f"{place}: expected an array of shape {list(spec.shape)}", place=place)
    return validate(array, spec, place)


def describe_step(spec: TensorSpec) -> str:
    """Returns a description of one time step in JSON: `[5 numbers]`."""
    kind = "number" if spec.dtype == "float32" else "integer"
    if not spec.shape:
        return JSON_NAMES["float" if spec.dtype == "float32" else "int"]
    *axes, last = spec.shape
    return "".join(f"[{axis} times " for axis in axes) + f"[{last} {kind}{'' if last == 1 else 's'}]" + "]" * len(axes)


def brackets(where: tuple[int, ...]) -> str:
    """Returns indices in brackets, `[3][17]`."""
    return "".join(f"[{number}]" for number in where)


def not_finite(place: str) -> InvalidInput:
    """Returns the error for a number that float32 cannot hold."""
    return InvalidInput(f"{place}: not a finite number that float32 can hold", place=place)


def _first_invalid(array: Array, spec: TensorSpec | StateSpec) -> tuple[int, ...] | None:
    """Returns where the first number is that is not finite or out of bounds."""
    if spec.dtype == "float32":
        if np.isfinite(array).all():
            return None
        bad = ~np.isfinite(array)
    else:
        low, high = bounds_of(spec)
        if not array.size or (array.min() >= low and array.max() <= high):
            return None
        bad = (array < low) | (array > high)
    return tuple(map(int, np.unravel_index(np.argmax(bad), bad.shape)))


def _refuse(value: Any, spec: TensorSpec | StateSpec, place: str) -> NoReturn:
    if spec.dtype == "float32":
        raise not_finite(place)
    low, high = bounds_of(spec)
    raise InvalidInput(
        f"{place}: {excerpt(str(int(value)))} is out of bounds: send an integer from {low} to {high}",
        place=place,
        bounds=[low, high],
    )


def _refuse_steps(steps: list[Any], spec: TensorSpec, name_step: Callable[[int], str]) -> NoReturn:
    """Raises the error for the first wrong length, or else for the first integer that int64 cannot hold."""
    for number, step in enumerate(steps):
        found = _first_wrong_length(step, spec.shape)
        if found:
            where, length, expected = found
            place = name_step(number) + brackets(where)
            raise InvalidInput(
                f"{place}: {length} number{'' if length == 1 else 's'} where the model takes {expected} "
                f"(a time step is {describe_step(spec)})",
                place=place,
            )
    _refuse_large(steps, spec, name_step)


def _refuse_large(steps: list[Any], spec: TensorSpec | StateSpec, name_step: Callable[[int], str]) -> NoReturn:
    """Raises the error for the first integer that int64 cannot hold."""
    where, value = _first_large(steps) or ((0,), 0)
    _refuse(value, spec, name_step(where[0]) + brackets(where[1:]))


def _first_large(values: list[Any]) -> tuple[tuple[int, ...], int] | None:
    for number, value in enumerate(values):
        if isinstance(value, list):
            found = _first_large(value)
            if found:
                return (number, *found[0]), found[1]
        elif not _INT64.min <= value <= _INT64.max:
            return (number,), value
    return None


def _first_wrong_length(values: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int] | None:
    """Returns where the first list of a wrong length is, that length, and the right one."""
    if not shape:
        return None
    if len(values) != shape[0]:
        return (), len(values), shape[0]
    for number, inner in enumerate(values) if len(shape) > 1 else ():
        found = _first_wrong_length(inner, shape[1:])
        if found:
            return (number, *found[0]), found[1], found[2]
    return None
