"""Reads tensors out of JSON and checks them, once; an error names the place of what is wrong in the request."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.signature import Signature
from service.errors import InvalidInput, NotJson

Array = NDArray[Any]
T = TypeVar("T")

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_JSON_NAMES = {"int": "an integer", "float": "a number", "str": "a string", "bool": "a boolean", "null": "null",
               "array": "an array", "object": "an object"}  # fmt: skip


def decode(decoder: msgspec.json.Decoder[T], body: bytes | msgspec.Raw, place: str = "") -> T:
    """Decodes JSON of a given type.

    Args:
        decoder: Of the type.
        body: The JSON.
        place: Where it stands in the request, for messages.

    Raises:
        NotJson: It cannot be parsed.
        InvalidInput: It is of another type, or holds a number that is not finite.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _misfit(str(error), bytes(body), place) from None
    except RecursionError:
        raise InvalidInput(f"{place or 'the body'}: arrays or objects are nested too deeply", place=place) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unparsable(str(error), bytes(body), place) from None


class TensorReader:
    """Reads the tensors of one model's requests.

    Args:
        signature: Of the model; it has one input.
    """

    def __init__(self, signature: Signature) -> None:
        self.spec = signature.inputs[0]
        self.states_spec = {state.name: state for state in signature.states}
        steps: Any = float
        for _ in range(len(self.spec.shape) + 1):
            steps = list[steps]
        self._step = msgspec.json.Decoder(steps.__args__[0])
        self._steps = msgspec.json.Decoder(steps)
        self._sequences = msgspec.json.Decoder(list[steps])
        self._tensors = msgspec.json.Decoder(dict[str, Any])
        self._tensor_list = msgspec.json.Decoder(list[dict[str, Any] | None])
        self._flat = self.spec.shape[0] if len(self.spec.shape) == 1 else None
        self._features = "x".join(map(str, self.spec.shape))

    def sequences(self, raw: msgspec.Raw) -> list[Array]:
        """Reads `sequences`: a list of `[time, *features]`, each of its own length, from the first time step on."""
        return self.arrays(decode(self._sequences, raw, "sequences"))

    def arrays(self, sequences: list[list[Any]]) -> list[Array]:
        """Makes arrays `[time, *features]` of sequences in nested lists of numbers."""
        with np.errstate(over="ignore"):
            return [self._sequence(sequence, f"sequences[{number}]") for number, sequence in enumerate(sequences)]

    def _sequence(self, values: list[Any], place: str) -> Array:
        if self._flat and set(map(len, values)) == {self._flat}:
            # In half the time that np.asarray takes for nested lists.
            numbers = np.fromiter(chain.from_iterable(values), np.float32, len(values) * self._flat)
            if np.isfinite(numbers).all():
                return numbers.reshape(-1, self._flat)
        return self._array(values, place)

    def single(self, values: list[Any]) -> Array | None:
        """Makes `[1, features]` of one time step's numbers; None where they do not fit or are no plain list."""
        if self._flat == len(values) and max(values) <= _FLOAT32_MAX and min(values) >= -_FLOAT32_MAX:
            return np.array([values], np.float32)
        return None

    def x(self, raw: msgspec.Raw) -> tuple[Array, bool]:
        """Reads `x` of a step: one time step `[*features]` or several `[time, *features]`.

        Returns:
            `[time, *features]`, and whether it was one time step without a time axis.
        """
        single = _depth(raw) <= len(self.spec.shape)
        values = decode(self._step if single else self._steps, raw, "x")
        if single:
            return self._array([values], "x", single=True), True
        return self._array(values, "x"), False

    def states(self, raw: msgspec.Raw, count: int) -> list[dict[str, Array] | None]:
        """Reads `states` of a prediction: one `{tensor: array}` a sequence, or null for zeros."""
        given = decode(self._tensor_list, raw, "states")
        if len(given) != count:
            raise InvalidInput(
                f"states: {len(given)} entries for {count} sequences: send one (or null for zeros) a sequence",
                place="states",
            )
        return [
            None if tensors is None else self._state(tensors, f"states[{number}]")
            for number, tensors in enumerate(given)
        ]

    def state(self, raw: msgspec.Raw) -> dict[str, Array]:
        """Reads `states` of one session: `{tensor: array}`."""
        return self._state(decode(self._tensors, raw, "states"), "states")

    def _state(self, tensors: dict[str, Any], place: str) -> dict[str, Array]:
        if tensors.keys() != self.states_spec.keys():
            raise InvalidInput(
                f"{place}: has the tensors {sorted(tensors)}, the model's states are {sorted(self.states_spec)}",
                place=place,
            )
        return {
            name: checked_array(tensors[name], spec.shape, f"{place}[{json.dumps(name)}]")
            for name, spec in self.states_spec.items()
        }

    def _array(self, values: list[Any], place: str, single: bool = False) -> Array:
        """Makes `[time, *features]` of nested lists of numbers, or says where they do not fit."""
        try:
            with np.errstate(over="ignore"):
                array = np.asarray(values, np.float32)
        except ValueError:
            array = None
        if array is None or array.shape[1:] != self.spec.shape or not len(array):
            raise self._shape_error(values, place, single)
        if not np.isfinite(array).all():
            where = tuple(np.argwhere(~np.isfinite(array))[0])
            raise _not_finite(place + _brackets(where[1:] if single else where))
        return array

    def _shape_error(self, values: list[Any], place: str, single: bool) -> InvalidInput:
        if not values:
            return InvalidInput(f"{place}: empty: send at least one time step", place=place)
        for step, value in enumerate(values):
            found = _first_misfit(value, self.spec.shape, place if single else f"{place}[{step}]")
            if found:
                where, length, wanted = found
                return InvalidInput(
                    f"{where}: {length} numbers where the model takes {wanted} (a time step is {self._features})",
                    place=where,
                )
        raise AssertionError("lists that fit do not get here")


def checked_array(values: Any, shape: tuple[int, ...], place: str) -> Array:
    """Makes a float32 array of a shape of nested lists of numbers, or raises InvalidInput that names the place."""
    for where, leaf in _leaves(values, place):
        if isinstance(leaf, bool) or not isinstance(leaf, int | float):
            raise InvalidInput(f"{where}: expected a number, got {_json_name(leaf)}", place=where)
        if not abs(leaf) <= _FLOAT32_MAX:
            raise _not_finite(where)
    try:
        array = np.asarray(values, np.float32)
    except ValueError:
        array = np.empty(0, np.float32)
    if array.shape != shape:
        raise InvalidInput(f"{place}: expected an array of shape {list(shape)}", place=place)
    return array


def _depth(raw: msgspec.Raw) -> int:
    """Counts the brackets that JSON opens before its first value."""
    depth = 0
    for byte in bytes(raw):
        if byte == ord("["):
            depth += 1
        elif byte not in b" \t\r\n":
            break
    return depth


def _leaves(values: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(values, list):
        for number, value in enumerate(values):
            yield from _leaves(value, f"{place}[{number}]")
    else:
        yield place, values


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


def _brackets(where: tuple[int, ...]) -> str:
    return "".join(f"[{number}]" for number in where)


def _not_finite(place: str) -> InvalidInput:
    return InvalidInput(f"{place}: not a finite number that float32 can hold", place=place)


def _json_name(value: Any) -> str:
    names = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null", list: "array", dict: "object"}
    return _JSON_NAMES[names[type(value)]]


def _misfit(message: str, body: bytes, place: str) -> InvalidInput:
    """Turns msgspec's message (``Expected `float`, got `str` - at `$[3][17]` ``) into ours."""
    what, _, path = message.partition(" - at `$")
    where = place + path.rstrip("`")
    where = where if place else where.removeprefix(".")
    if what == "Number out of range":
        return _not_finite(where)
    what = re.sub(r"`([a-z| ]+)`", lambda match: _words(match[1]), what)
    what = what[:1].lower() + what[1:]
    return InvalidInput(f"{where}: {what}" if where else what, place=where)


def _words(types: str) -> str:
    return " or ".join(_JSON_NAMES.get(name, f"`{name}`") for name in types.split(" | "))


def _unparsable(message: str, body: bytes, place: str) -> InvalidInput | NotJson:
    """Tells NaN and Infinity, which Python writes and JSON does not have, from what is no JSON at all."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return NotJson(f"{message}: send a JSON document in UTF-8")
    for where, leaf in _everything(parsed, place):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            return _not_finite(where)
    return NotJson(f"{message}: send a JSON document in UTF-8")


def _everything(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _everything(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _everything(inner, f"{place}[{number}]")
    else:
        yield place, value
