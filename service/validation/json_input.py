"""Decodes and validates tensors in JSON requests; errors name the place in the request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import Signature, TensorSpec
from cellserve.service.errors import InvalidInput
from cellserve.service.runtime.tensor_layout import TensorLayout
from cellserve.service.validation.json_errors import explain_parse_error, explain_validation_error
from cellserve.service.validation.tensor_values import FLOAT32_MAX, array_of, bounds_of, describe_step, state_of

Array = NDArray[Any]
T = TypeVar("T")

PART_BYTES = 64 * 1024  # size of the JSON decoded at a time
_parts = msgspec.json.Decoder(list[msgspec.Raw])


def decode(decoder: msgspec.json.Decoder[T], body: bytes | msgspec.Raw, place: str = "", advice: str = "") -> T:
    """Decodes JSON of a type.

    Args:
        decoder: A decoder of the type.
        body: The JSON.
        place: Its place in the request, for error messages.
        advice: A description of the expected arrays and objects, for error messages.

    Raises:
        NotJson: It cannot be parsed.
        InvalidInput: It has another type, or a number that is not finite.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise explain_validation_error(str(error), decoder.type, bytes(body), place, advice) from None
    except RecursionError:
        raise InvalidInput(f"{place or 'the body'}: arrays or objects are nested too deeply", place=place) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise explain_parse_error(str(error), bytes(body), place) from None


class InputDecoder:
    """A decoder of one of a model's inputs.

    Args:
        spec: The input's specification.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        step: Any = float if spec.dtype == "float32" else int
        for _ in spec.shape:
            step = list[step]
        self._step = msgspec.json.Decoder(step)
        self._steps = msgspec.json.Decoder(list[step])
        self._sequences = msgspec.json.Decoder(list[list[step]])
        self._advice = f"a time step is {describe_step(spec)}"
        self.flat = spec.shape[0] if len(spec.shape) == 1 and spec.dtype == "float32" else None

    def sequences(self, raw: msgspec.Raw) -> list[Array]:
        """Decodes a list of sequences `[time, *features]` of any lengths."""
        return self.arrays(decode(self._sequences, raw, "sequences", f"{self._advice}, a sequence is a list of them"))

    def arrays(self, sequences: list[list[Any]]) -> list[Array]:
        """Returns arrays `[time, *features]` of sequences in nested lists of numbers."""
        with np.errstate(over="ignore"):
            return [self._sequence(sequence, f"sequences[{number}]") for number, sequence in enumerate(sequences)]

    def _sequence(self, values: list[Any], place: str) -> Array:
        if self.flat and set(map(len, values)) == {self.flat}:
            # Twice as fast as np.asarray of nested lists.
            numbers = np.fromiter(chain.from_iterable(values), np.float32, len(values) * self.flat)
            if np.isfinite(numbers).all():
                return numbers.reshape(-1, self.flat)
        return array_of(values, self.spec, place)

    def steps(self, raw: msgspec.Raw, place: str) -> Array:
        """Decodes one sequence `[time, *features]`."""
        return self._sequence(decode(self._steps, raw, place, self._advice), place)

    def x(self, raw: msgspec.Raw, place: str) -> tuple[Array, bool]:
        """Decodes one time step `[*features]` or several `[time, *features]`.

        Returns:
            `[time, *features]`, and whether the JSON was one time step without a time axis.
        """
        if _depth(raw) > len(self.spec.shape):
            return array_of(decode(self._steps, raw, place, self._advice), self.spec, place), False
        return array_of([decode(self._step, raw, place, self._advice)], self.spec, place, single=True), True


class TensorDecoder:
    """A decoder of the tensors in one model's requests.

    A model with several inputs takes an object keyed by their names in place of an array, which becomes a structured
    array (`cellserve.service.runtime.tensor_layout`).

    Args:
        signature: The model's signature.
    """

    def __init__(self, signature: Signature) -> None:
        self.states_spec = {state.name: state for state in signature.states}
        self._inputs = {spec.name: InputDecoder(spec) for spec in signature.inputs}
        self._only = next(iter(self._inputs.values())) if len(self._inputs) == 1 else None
        self._layout = TensorLayout(signature.inputs)
        spec = signature.inputs[0]
        self._flat = self._only.flat if self._only else None
        # The bounds of a model's symbols, if it takes one integer per time step.
        self._symbols = bounds_of(spec) if self._only and spec.dtype != "float32" and not spec.shape else None
        self._advice = f"the model's inputs are {', '.join(self._inputs)}: send an object with an array for each"
        self._raws = msgspec.json.Decoder(dict[str, msgspec.Raw])
        self._raw_list = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
        self._tensors = msgspec.json.Decoder(dict[str, Any])
        self._tensor_list = msgspec.json.Decoder(list[dict[str, Any] | None])

    @property
    def plain(self) -> bool:
        """Whether a time step is a plain list of numbers, as for most models."""
        return self._flat is not None

    def sequences(self, raw: msgspec.Raw) -> list[Array]:
        """Decodes `sequences`: a list of `[time, *features]` of any lengths."""
        if self._only is not None:
            return self._only.sequences(raw)
        given: list[dict[str, msgspec.Raw]] = decode(self._raw_list, raw, "sequences", self._advice)
        return [
            self._concatenate(tensors, f"sequences[{number}]", whole=True)[0] for number, tensors in enumerate(given)
        ]

    def in_parts(self, raw: msgspec.Raw, place: str) -> Iterator[tuple[Array, int]]:
        """Decodes a sequence in parts; yields some time steps `[time, *features]` and the size of their JSON."""
        size = len(bytes(raw))
        if self._only is None:
            yield self._concatenate(decode(self._raws, raw, place, self._advice), place, whole=True)[0], size
            return
        if size <= PART_BYTES:
            yield self._only.steps(raw, place), size
            return
        steps = decode(_parts, raw, place)
        count = max(1, len(steps) * PART_BYTES // size)
        for start in range(0, len(steps), count):
            part = b"[" + b",".join(map(bytes, steps[start : start + count])) + b"]"
            try:
                yield self._only.steps(msgspec.Raw(part), place), len(part)
            except InvalidInput as error:
                raise _shift_place(error, place, start) from None

    def arrays(self, sequences: list[list[Any]]) -> list[Array]:
        """Returns arrays `[time, *features]` of nested lists of numbers; only if the model is `plain`."""
        assert self._only is not None
        return self._only.arrays(sequences)

    def decode_one_step(self, values: list[Any] | int) -> Array | None:
        """Returns `[1, *features]` of one time step's numbers; None if they are invalid or not a flat list."""
        if type(values) is int:
            bounds = self._symbols
            if bounds is not None and bounds[0] <= values <= bounds[1]:
                return np.array((values,), self._layout.dtype)
        elif self._flat == len(values) and max(values) <= FLOAT32_MAX and min(values) >= -FLOAT32_MAX:  # type: ignore[arg-type]
            return np.array([values], np.float32)
        return None

    def x(self, raw: msgspec.Raw) -> tuple[Array, bool]:
        """Decodes `x` of a step: one time step `[*features]` or several `[time, *features]`.

        Returns:
            `[time, *features]`, and whether the JSON was one time step without a time axis.
        """
        if self._only is not None:
            return self._only.x(raw, "x")
        return self._concatenate(decode(self._raws, raw, "x", self._advice), "x")

    def _concatenate(self, tensors: dict[str, msgspec.Raw], place: str, whole: bool = False) -> tuple[Array, bool]:
        """Returns one structured array of several inputs; with `whole`, each must have a time axis."""
        if tensors.keys() != self._inputs.keys():
            raise InvalidInput(
                f"{place}: has the tensors {sorted(tensors)}, the model's inputs are {sorted(self._inputs)}",
                place=place,
            )
        read = {}
        for name, reader in self._inputs.items():
            where = f"{place}[{json.dumps(name)}]"
            read[name] = (reader.steps(tensors[name], where), False) if whole else reader.x(tensors[name], where)
        times = {name: "none" if single else str(len(array)) for name, (array, single) in read.items()}
        if len(set(times.values())) > 1:
            told = ", ".join(f"{name} {time}" for name, time in times.items())
            raise InvalidInput(
                f"{place}: the inputs differ in time steps ({told}): send as many of each, or none with a time axis",
                place=place,
            )
        return self._layout.pack([array for array, _ in read.values()]), "none" in times.values()

    def states(self, raw: msgspec.Raw, count: int) -> list[dict[str, Array] | None]:
        """Decodes `states` of a prediction: per sequence `{tensor: array}`, or null for zeros."""
        given = decode(self._tensor_list, raw, "states")
        if len(given) != count:
            raise InvalidInput(
                f"states: {len(given)} entries for {count} sequences: send one (or null for zeros) per sequence",
                place="states",
            )
        return [
            None if tensors is None else self._state(tensors, f"states[{number}]")
            for number, tensors in enumerate(given)
        ]

    def state(self, raw: msgspec.Raw) -> dict[str, Array]:
        """Decodes `states` of one session: `{tensor: array}`."""
        return self._state(decode(self._tensors, raw, "states"), "states")

    def _state(self, tensors: dict[str, Any], place: str) -> dict[str, Array]:
        if tensors.keys() != self.states_spec.keys():
            raise InvalidInput(
                f"{place}: has the tensors {sorted(tensors)}, the model's states are {sorted(self.states_spec)}",
                place=place,
            )
        return {
            name: state_of(tensors[name], spec, f"{place}[{json.dumps(name)}]")
            for name, spec in self.states_spec.items()
        }


def _shift_place(error: InvalidInput, place: str, start: int) -> InvalidInput:
    """Returns an error in a part of a sequence with its place in the whole one, where the part begins at `start`."""
    found = re.match(re.escape(place) + r"\[(\d+)\]", str(error.extensions.get("place", "")))
    if found is None:
        return error
    where = error.extensions["place"].replace(found[0], f"{place}[{int(found[1]) + start}]", 1)
    return InvalidInput(error.detail.replace(error.extensions["place"], where, 1), place=where)


def _depth(raw: msgspec.Raw) -> int:
    """Returns how many brackets the JSON opens before its first value."""
    depth = 0
    for byte in bytes(raw):
        if byte == ord("["):
            depth += 1
        elif byte not in b" \t\r\n":
            break
    return depth
