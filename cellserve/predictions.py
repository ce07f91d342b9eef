"""`predict`: whole sequences, NumPy in and NumPy out, in safetensors on the wire (docs/protocol.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from cellserve.calls import SAFETENSORS, Call, Request, exchange
from cellserve.numbers import Array, body_of, tensors_of
from cellserve.retry import Retry

Outputs = Literal["last", "all"]
States = Mapping[str, ArrayLike]
Y = TypeVar("Y")
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Prediction(Generic[Y, S]):
    """What a model makes of sequences; of each in a list, or of the one that was given.

    Attributes:
        y: `[time, *outputs]`, or `[*outputs]` of the last time step, float32.
        states: The last states by name, `[*shape]` each, where they were asked for.
        model: The model's name.
        version: Its version.
    """

    y: Y
    states: S
    model: str
    version: int


def predict(
    model: str | None,
    sequences: Array | Sequence[ArrayLike],
    outputs: Outputs | None,
    states: States | Sequence[States | None] | None,
    return_states: bool,
    retry: Retry,
) -> Call[Prediction[Any, Any]]:
    """Predicts; an array is one sequence, a list holds several."""
    one = isinstance(sequences, np.ndarray)
    given = [np.asarray(sequence, np.float32) for sequence in ([sequences] if one else sequences)]
    if not given:
        raise ValueError("sequences: empty: give at least one sequence")
    if len({array.shape[1:] for array in given}) > 1 or not given[0].ndim:
        raise ValueError(f"sequences: their shapes are {[array.shape for array in given]}: give [time, features] each")
    tensors: dict[str, Array] = {"x": np.concatenate(given), "lengths": np.array([len(array) for array in given])}
    if states is not None:
        tensors |= _stacked([states] if isinstance(states, Mapping) else states, len(given))
    options = {"model": model, "outputs": outputs, "return_states": "true" if return_states else None}
    params = {name: option for name, option in options.items() if option is not None}
    reply = yield from exchange(Request("POST", "/predict", body_of(tensors), SAFETENSORS, params), retry)
    answer, told = tensors_of(reply.content)
    y, lengths = answer.pop("y"), answer.pop("lengths", None)
    ys = list(y) if lengths is None else np.split(y, np.cumsum(lengths)[:-1])
    last = [{name: tensor[row] for name, tensor in answer.items()} for row in range(len(ys))] if return_states else None
    if one:
        return Prediction(ys[0], last and last[0], told["model"], int(told["version"]))
    return Prediction(ys, last, told["model"], int(told["version"]))


def _stacked(states: Sequence[States | None], count: int) -> dict[str, Array]:
    """Gives each state of all sequences, `[sequences, *shape]`; zeros where a sequence has none."""
    if len(states) != count:
        raise ValueError(f"states: {len(states)} of them for {count} sequences: give one, or None, a sequence")
    arrays = [one and {name: np.asarray(state, np.float32) for name, state in one.items()} for one in states]
    zeros = {name: np.zeros_like(state) for one in arrays if one for name, state in one.items()}
    return {name: np.stack([one.get(name, zero) if one else zero for one in arrays]) for name, zero in zeros.items()}
