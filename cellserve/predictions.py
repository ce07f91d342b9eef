"""`predict`: whole sequences, NumPy in and NumPy out, in safetensors on the wire (docs/protocol.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from cellserve import calls
from cellserve.calls import SAFETENSORS, Call, Request, exchange
from cellserve.errors import InvalidInput
from cellserve.layout import Given, Outputs
from cellserve.numbers import Array, body_of, float32, has_integers, tensors_of
from cellserve.retry import Retry
from cellserve.signatures import Signatures

States = Mapping[str, ArrayLike]
Y = TypeVar("Y")
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Prediction(Generic[Y, S]):
    """What a model makes of sequences; of each in a list, or of the one that was given.

    Attributes:
        y: `[time, *outputs]`, or `[*outputs]` of the last time step, in the model's type (float32 mostly); of several
            outputs a dict, each by its name.
        states: The last states by name, `[*shape]` each, where they were asked for.
        model: The model's name.
        version: Its version.
    """

    y: Y
    states: S
    model: str
    version: int


def predict(
    signatures: Signatures,
    model: str | None,
    sequences: Array | Mapping[str, ArrayLike] | Sequence[Given],
    outputs: Outputs | None,
    states: States | Sequence[States | None] | None,
    return_states: bool,
    retry: Retry,
) -> Call[Prediction[Any, Any]]:
    """Predicts; an array, or a dict of several inputs, is one sequence, a list holds several.

    The model's signature is asked for only where the wire leaves open what is what: numbers given as integers, which a
    model of float32 takes too, and states in the answer.
    """
    one = isinstance(sequences, np.ndarray | Mapping)
    listed: Sequence[Any] = [sequences] if one else list(sequences)
    given = [_named(sequence) for sequence in listed]
    tensors, lengths = _joined(given)
    if states is not None:
        tensors |= _stacked([states] if isinstance(states, Mapping) else states, len(given))
    options = {"model": model, "outputs": outputs, "return_states": "true" if return_states else None}
    params = {name: option for name, option in options.items() if option is not None}
    served = model if model is not None or not has_integers(tensors) else (yield from calls.only_model(retry))
    while True:
        known = (yield from signatures.of(served)) if served is not None and has_integers(tensors) else None
        wanted = (tensors if known is None else known.as_wanted(tensors)) | {"lengths": np.array(lengths)}
        try:
            request = Request("POST", "/predict", body_of(wanted), SAFETENSORS, params)
            reply = yield from exchange(request, retry)
            break
        except InvalidInput:
            if served is None or known is None or not (yield from signatures.has_changed(served, known)):
                raise
    answer, told = tensors_of(reply.content)
    name, version = told["model"], int(told["version"])
    signatures.answered(model or name, version)
    every_output = answer.pop("lengths", None) is not None
    last: list[dict[str, Array]] | None = None
    if return_states:
        spec = (yield from signatures.of(name, version)).states
        final = {state: answer.pop(state) for state in spec}
        last = [{state: tensor[row, ...] for state, tensor in final.items()} for row in range(len(given))]
    parts = {key: _split(y, lengths if every_output else None) for key, y in answer.items()}
    ys: list[Any]
    if len(parts) == 1:
        (ys,) = parts.values()
    else:
        ys = [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
    return Prediction(ys[0], last and last[0], name, version) if one else Prediction(ys, last, name, version)


def _named(sequence: Given) -> dict[str, Array]:
    """Gives the tensors of a sequence; what is alone is called x."""
    if isinstance(sequence, Mapping):
        return {name: float32(tensor) for name, tensor in sequence.items()}
    return {"x": float32(sequence)}


def _joined(given: Sequence[dict[str, Array]]) -> tuple[dict[str, Array], list[int]]:
    """Gives each input of all sequences, one after the other, and how many time steps each sequence has."""
    if not given:
        raise ValueError("sequences: empty: give at least one sequence")
    names = given[0].keys()
    if not names or any(tensors.keys() != names for tensors in given):
        raise ValueError(f"sequences: they have the inputs {[sorted(one) for one in given]}: give the same of each")
    for name in names:
        shapes = [tensors[name].shape for tensors in given]
        if len({shape[1:] for shape in shapes}) > 1 or not all(shapes):
            raise ValueError(f"sequences: their shapes are {shapes}: give [time, *features] each")
    lengths = [{name: len(tensor) for name, tensor in tensors.items()} for tensors in given]
    for number, times in enumerate(lengths):
        if len(set(times.values())) > 1:
            raise ValueError(f"sequences[{number}]: its inputs differ in time steps: {times}")
    joined = {name: float32(np.concatenate([tensors[name] for tensors in given])) for name in names}
    return joined, [next(iter(times.values())) for times in lengths]


def _split(y: Array, lengths: Sequence[int] | None) -> list[Array]:
    """Gives each sequence's part of an output of all, which has their time steps one after the other, or the last."""
    return np.split(y, np.cumsum(lengths)[:-1]) if lengths else [y[row, ...] for row in range(len(y))]


def _stacked(states: Sequence[States | None], count: int) -> dict[str, Array]:
    """Gives each state of all sequences, `[sequences, *shape]`; zeros where a sequence has none."""
    if len(states) != count:
        raise ValueError(f"states: {len(states)} of them for {count} sequences: give one, or None, a sequence")
    arrays = [one and {name: float32(state) for name, state in one.items()} for one in states]
    zeros = {name: np.zeros_like(state) for one in arrays if one for name, state in one.items()}
    stacked = {name: np.stack([one.get(name, zero) if one else zero for one in arrays]) for name, zero in zeros.items()}
    return {name: float32(state) for name, state in stacked.items()}
