"""Checks the numbers of one tensor against what the model takes; an error names the place in the request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import StateSpec, TensorSpec
from cellserve.service.errors import InvalidInput
from cellserve.service.runtime.tensor_layout import Layout

Array = NDArray[Any]

FLOAT32_MAX = float(np.finfo(np.float32).max)
JSON_NAMES = {"int": "an integer", "float": "a number", "str": "a string", "bool": "a boolean", "null": "null",
              "array": "an array", "object": "an object"}  # fmt: skip


def bounds_of(spec: TensorSpec | StateSpec) -> tuple[int, int]:
    """Gives the smallest and the largest integer that a tensor takes."""
    given = spec.bounds if isinstance(spec, TensorSpec) else None
    if given is not None:
        return given
    limits = np.iinfo(spec.dtype)
    return int(limits.min), int(limits.max)


def checked(array: Array, spec: TensorSpec | StateSpec, place: str, skipped: int = 0) -> Array:
    """Gives an array in a tensor's type, or raises InvalidInput where a number is not finite or out of bounds.

    Args:
        array: Floating-point for a float32 tensor, integers for another.
        spec: Of the tensor.
        place: Of the array in the request.
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


def validate_together(array: Array, layout: Layout, place: str) -> Array:
    """Checks the inputs that lie in one array, as `checked` does."""
    if array.dtype.names is None:
        return checked(array, layout.specs[0], place)
    named = ((array[spec.name], spec, f"{place}[{json.dumps(spec.name)}]") for spec in layout.specs)
    return layout.join([checked(*one) for one in named])


def array_of(values: list[Any], spec: TensorSpec, place: str, single: bool = False) -> Array:
    """Makes `[time, *shape]` of nested lists of numbers, or says where they do not fit; single: of one time step."""
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
    return checked(array, spec, place, int(single))


def state_of(values: Any, spec: StateSpec, place: str) -> Array:
    """Makes a state `[*shape]` of nested lists of numbers, or raises InvalidInput that names the place."""
    whole = spec.dtype != "float32"
    for where, leaf in leaves(values, place):
        if isinstance(leaf, bool) or not isinstance(leaf, int if whole else int | float):
            raise InvalidInput(f"{where}: expected {'an integer' if whole else 'a number'}, got {json_name(leaf)}",
                               place=where)  # fmt: skip
        low, high = bounds_of(spec) if whole else (-FLOAT32_MAX, FLOAT32_MAX)
        if not low <= leaf <= high:
            if whole:
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
    """Says what one time step is in JSON: `[5 numbers]`."""
    kind = "number" if spec.dtype == "float32" else "integer"
    if not spec.shape:
        return JSON_NAMES["float" if spec.dtype == "float32" else "int"]
    *axes, last = spec.shape
    return "".join(f"[{axis} times " for axis in axes) + f"[{last} {kind}{'' if last == 1 else 's'}]" + "]" * len(axes)


def leaves(values: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Gives all that is no list in nested lists, each with its place."""
    if isinstance(values, list):
        for number, value in enumerate(values):
            yield from leaves(value, f"{place}[{number}]")
    else:
        yield place, values


def brackets(where: tuple[int, ...]) -> str:
    """Writes indices."""
    return "".join(f"[{number}]" for number in where)


def not_finite(place: str) -> InvalidInput:
    """Gives what to raise of a number that float32 does not hold."""
    return InvalidInput(f"{place}: not a finite number that float32 can hold", place=place)


def json_name(value: Any) -> str:
    """Gives what JSON calls a value."""
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
        found = _first_misfit(value, spec.shape, place if single else f"{place}[{step}]")
        if found:
            where, length, wanted = found
            return InvalidInput(
                f"{where}: {length} number{'' if length == 1 else 's'} where the model takes {wanted} "
                f"(a time step is {describe_step(spec)})",
                place=where,
            )
    raise AssertionError("lists that fit do not get here")


def _first_misfit(value: Any, shape: tuple[int, ...], place: str) -> tuple[str, int, int] | None:
    """Gives the place of the first list of a wrong length, that length, and the right one."""
    if not shape:
        return None
    if len(value) != shape[0]:
        return place, len(value), shape[0]
    for number, inner in enumerate(value):
        found = _first_misfit(inner, shape[1:], f"{place}[{number}]")
        if found:
            return found
    return None
