"""Decodes and validates tensors in JSON requests; errors name the place in the request."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import Signature, StateSpec, TensorSpec
from cellserve.service.errors import BodyTooLarge, InvalidInput, listed
from cellserve.service.runtime.tensor_layout import TensorLayout
from cellserve.service.validation.json_errors import explain_parse_error, explain_validation_error
from cellserve.service.validation.plain_numbers import read_sequences
from cellserve.service.validation.tensor_values import FLOAT32_MAX, array_of, bounds_of, describe_step, state_of

Array = NDArray[Any]
T = TypeVar("T")

_OPENED = re.compile(rb"[\[ \t\r\n]*")


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
        step: Any = _type_of(spec)
        self._step = msgspec.json.Decoder(step)
        self._steps = msgspec.json.Decoder(list[step])
        self._sequences = msgspec.json.Decoder(list[list[step]])
        self._advice = f"a time step is {describe_step(spec)}"
        self.flat = spec.shape[0] if len(spec.shape) == 1 and spec.dtype == "float32" else None

    def plain_sequences(self, raw: msgspec.Raw, most: int) -> Sequence[Array] | None:
        """Decodes the most common list of sequences; None where it is another one, or something is wrong with it."""
        read = None if self.flat is None else read_sequences(raw, self.flat)
        return split(*read) if read is not None and len(read[1]) <= most else None

    def sequences(self, raw: msgspec.Raw, most: int) -> Sequence[Array]:
        """Decodes a list of at most so many sequences `[time, *features]` of any lengths."""
        plain = self.plain_sequences(raw, most)
        if plain is not None:
            return plain
        sequences = decode(self._sequences, raw, "sequences", f"{self._advice}, a sequence is a list of them")
        check_sequences(len(sequences), most)
        lengths = list(map(len, sequences))
        if 0 in lengths:
            raise _empty(f"sequences[{lengths.index(0)}]")
        ends = list(accumulate(lengths))

        def name_step(step: int) -> str:
            number = bisect_right(ends, step)
            return f"sequences[{number}][{step - (ends[number] - lengths[number])}]"

        steps = sequences[0] if len(sequences) == 1 else list(chain.from_iterable(sequences))
        return split(array_of(steps, self.spec, name_step), lengths) if steps else []

    def steps(self, raw: msgspec.Raw, place: str) -> Array:
        """Decodes one sequence `[time, *features]`."""
        read = None if self.flat is None else read_sequences(b"[%b]" % raw, self.flat)
        if read is not None:
            return read[0]
        steps = decode(self._steps, raw, place, self._advice)
        if not steps:
            raise _empty(place)
        return array_of(steps, self.spec, lambda step: f"{place}[{step}]")

    def x(self, raw: msgspec.Raw, place: str) -> tuple[Array, bool]:
        """Decodes one time step `[*features]` or several `[time, *features]`.

        Returns:
            `[time, *features]`, and whether the JSON was one time step without a time axis.
        """
        if depth_of(raw) > len(self.spec.shape):
            return self.steps(raw, place), False
        return array_of([decode(self._step, raw, place, self._advice)], self.spec, lambda _: place), True


class TensorDecoder:
    """A decoder of the tensors in one model's requests.

    A model with several inputs takes an object keyed by their names in place of an array, which becomes a structured
    array (`cellserve.service.runtime.tensor_layout`).

    Args:
        signature: The model's signature.
    """

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self.states_spec = {state.name: state for state in signature.states}
        self._states = {state.name: msgspec.json.Decoder(_type_of(state)) for state in signature.states}
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
        self._state_list = msgspec.json.Decoder(list[dict[str, msgspec.Raw] | None])

    def __reduce__(self) -> Any:
        """Another process makes one decoder for each signature that it gets."""
        return _decoder_of, (self._signature,)

    def sequences(self, raw: msgspec.Raw, most: int) -> Sequence[Array]:
        """Decodes `sequences`: a list of at most so many, `[time, *features]` of any lengths."""
        if self._only is not None:
            return self._only.sequences(raw, most)
        given: list[dict[str, msgspec.Raw]] = decode(self._raw_list, raw, "sequences", self._advice)
        check_sequences(len(given), most)
        return [
            self._concatenate(tensors, f"sequences[{number}]", whole=True)[0] for number, tensors in enumerate(given)
        ]

    def plain_sequences(self, raw: msgspec.Raw, most: int) -> Sequence[Array] | None:
        """Decodes the most common `sequences`; None where it is another one, or something is wrong with it."""
        return None if self._only is None else self._only.plain_sequences(raw, most)

    def decode_one_step(self, values: list[Any] | int) -> Array | None:
        """Returns `[1, *features]` of one time step's numbers; None if they are invalid or not a flat list."""
        if type(values) is int:
            bounds = self._symbols
            if bounds is not None and bounds[0] <= values <= bounds[1]:
                return np.array((values,), self._layout.dtype)
        elif self._flat == len(values) and max(values) <= FLOAT32_MAX and min(values) >= -FLOAT32_MAX:  # type: ignore[arg-type]
            return np.array([values], np.float32)
        return None

    def symbols(self, places: Array) -> Array:
        """Returns symbols `[time]` by their places in the order of all symbols."""
        assert self._symbols is not None
        return (places + self._symbols[0]).astype(self._layout.dtype)

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
                f"{place}: has the tensors {listed(tensors)}, the model's inputs are {sorted(self._inputs)}",
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
        given = decode(self._state_list, raw, "states")
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
        return self._state(decode(self._raws, raw, "states"), "states")

    def _state(self, tensors: dict[str, msgspec.Raw], place: str) -> dict[str, Array]:
        if tensors.keys() != self.states_spec.keys():
            raise InvalidInput(
                f"{place}: has the tensors {listed(tensors)}, the model's states are {sorted(self.states_spec)}",
                place=place,
            )
        states = {}
        for name, spec in self.states_spec.items():
            where = f"{place}[{json.dumps(name)}]"
            states[name] = state_of(decode(self._states[name], tensors[name], where), spec, where)
        return states


@lru_cache(maxsize=64)
def _decoder_of(signature: Signature) -> TensorDecoder:
    return TensorDecoder(signature)


def _type_of(spec: TensorSpec | StateSpec) -> Any:
    """Returns the type of a time step, or of a state, for msgspec: nested lists of numbers."""
    kind: Any = float if spec.dtype == "float32" else int
    for _ in spec.shape:
        kind = list[kind]
    return kind


def check_sequences(count: int, most: int) -> None:
    """Raises BodyTooLarge if a request has more sequences than it may."""
    if count > most:
        raise BodyTooLarge(
            f"sequences: a request may have {most}, got {count}: split it into several requests", limit=most
        )


class Sequences(Sequence[Array]):
    """Sequences of time steps, one after the other in one array; each is a view of it, made when it is asked for.

    A list of views would be thousands of objects to make, and for each run of the garbage collector to visit.

    Args:
        x: `[time steps of all, *features]`.
        lengths: The time steps of each sequence.
    """

    def __init__(self, x: Array, lengths: Sequence[int]) -> None:
        self._x, self._ends = x, np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: Any) -> Any:
        return self._x[self._ends[number] : self._ends[number + 1]]

    def __iter__(self) -> Iterator[Array]:
        return (self._x[start:end] for start, end in pairwise(self._ends.tolist()))


def split(x: Array, lengths: Sequence[int]) -> Sequence[Array]:
    """Returns the sequences in an array of the time steps of all, one sequence after the other."""
    return [x] if len(lengths) == 1 else Sequences(x, lengths)


def _empty(place: str) -> InvalidInput:
    return InvalidInput(f"{place}: empty: send at least one time step", place=place)


def depth_of(raw: msgspec.Raw) -> int:
    """Returns how many brackets the JSON opens before its first value."""
    opened = _OPENED.match(memoryview(raw))
    return 0 if opened is None else opened[0].count(b"[")
