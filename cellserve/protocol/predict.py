"""`POST /predict`: whole sequences in one safetensors body, NumPy in and NumPy out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from cellserve.protocol.http import SAFETENSORS, HttpRequest
from cellserve.protocol.tensor_codec import write_safetensors
from cellserve.signatures import Signature
from cellserve.tensors import Array, Outputs, States, TensorLike, Tensors, has_integers, to_tensor

Sequences: TypeAlias = Array | Mapping[str, ArrayLike] | Sequence[TensorLike]
Y = TypeVar("Y")
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Prediction(Generic[Y, S]):
    """A model's outputs: a list of them for a list of sequences, one for a single sequence.

    Attributes:
        y: `[time, *outputs]`, or `[*outputs]` for the last time step, in the model's type (mostly float32). Several
            outputs are a dict by name.
        states: Final states `{name: [*shape]}`; None unless requested.
        model: Name of the model.
        version: Version of the model.
    """

    y: Y
    states: S
    model: str
    version: int


One: TypeAlias = Prediction[Tensors, dict[str, Array] | None]
Many: TypeAlias = Prediction[list[Tensors], list[dict[str, Array]] | None]


class SequenceBatch:
    """Sequences of different lengths, concatenated along time.

    Args:
        sequences: An array, or a dict of several inputs, is one sequence; a list holds several.
        states: Initial states, for one sequence a dict, for several a list with a dict or None for each.

    Raises:
        ValueError: The sequences or states do not fit together.
    """

    def __init__(self, sequences: Sequences, states: States | Sequence[States | None] | None) -> None:
        self._single = isinstance(sequences, np.ndarray | Mapping)
        listed: Sequence[Any] = [sequences] if self._single else list(sequences)
        named = [_by_name(sequence) for sequence in listed]
        self._shapes = [{name: tensor.shape for name, tensor in sequence.items()} for sequence in named]
        self._tensors, self._lengths = _concatenate(named)
        if states is not None:
            self._tensors |= _stack([states] if isinstance(states, Mapping) else states, len(named))
        self.has_integers = has_integers(self._tensors)

    def request(
        self, model: str | None, outputs: Outputs | None, return_states: bool, signature: Signature | None
    ) -> HttpRequest:
        """Returns the request; integers are cast to float32 where the signature, if given, is float."""
        options = {"model": model, "outputs": outputs, "return_states": "true" if return_states else None}
        params = {name: option for name, option in options.items() if option is not None}
        tensors = self._tensors if signature is None else signature.cast_to_signature(self._tensors)
        body = write_safetensors({**tensors, "lengths": np.array(self._lengths)})
        return HttpRequest("POST", "/predict", body, SAFETENSORS, params)

    def misfit(self, signature: Signature) -> str | None:
        """Returns which sequence does not have the shape of the model's input, and what to give; None if all have."""
        for number, shapes in enumerate(self._shapes):
            for name, wanted in signature.sequence_shapes().items():
                shape = shapes.get(name)
                if shape is None or shape[1:] == wanted:
                    continue
                place = "sequences" if self._single else f"sequences[{number}]"
                if len(self._shapes[number]) > 1:
                    place += f"[{name!r}]"
                told = f"{place}: its shape is {list(shape)}: give [{', '.join(['time', *map(str, wanted)])}]"
                if self._single and len(shape) == 2 + len(wanted):
                    told += ": one array is one sequence, and several are a list of arrays (list(x))"
                return told
        return None

    def split(
        self, answer: dict[str, Array], model: str, version: int, states: Iterable[str] | None
    ) -> Prediction[Any, Any]:
        """Splits an answer into the outputs of each sequence.

        Args:
            answer: Tensors by name.
            model: Name of the model that answered.
            version: Its version.
            states: Names of the states in the answer; None if they were not requested.
        """
        all_steps = answer.pop("lengths", None) is not None
        final: list[dict[str, Array]] | None = None
        if states is not None:
            by_name = {name: answer.pop(name) for name in states}
            final = [{name: state[row, ...] for name, state in by_name.items()} for row in range(len(self._lengths))]
        parts = {name: self._rows(y, all_steps) for name, y in answer.items()}
        ys: list[Any]
        if len(parts) == 1:
            (ys,) = parts.values()
        else:
            ys = [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
        if self._single:
            return Prediction(ys[0], final and final[0], model, version)
        return Prediction(ys, final, model, version)

    def _rows(self, y: Array, all_steps: bool) -> list[Array]:
        return np.split(y, np.cumsum(self._lengths)[:-1]) if all_steps else [y[row, ...] for row in range(len(y))]


def _by_name(sequence: TensorLike) -> dict[str, Array]:
    """Returns a sequence's tensors by name; a single input is named x."""
    if isinstance(sequence, Mapping):
        return {name: to_tensor(tensor) for name, tensor in sequence.items()}
    return {"x": to_tensor(sequence)}


def _concatenate(sequences: Sequence[dict[str, Array]]) -> tuple[dict[str, Array], list[int]]:
    """Returns each input of all sequences concatenated along time, and the length of each sequence."""
    if not sequences:
        raise ValueError("sequences: empty: give at least one sequence")
    names = sequences[0].keys()
    if not names or any(tensors.keys() != names for tensors in sequences):
        raise ValueError(f"sequences: their inputs are {[sorted(one) for one in sequences]}: give the same for each")
    for name in names:
        shapes = [tensors[name].shape for tensors in sequences]
        if len({shape[1:] for shape in shapes}) > 1 or not all(shapes):
            raise ValueError(f"sequences: their shapes are {shapes}: give [time, *features] for each")
    lengths = [{name: len(tensor) for name, tensor in tensors.items()} for tensors in sequences]
    for number, times in enumerate(lengths):
        if len(set(times.values())) > 1:
            raise ValueError(f"sequences[{number}]: its inputs differ in time steps: {times}")
    joined = {name: to_tensor(np.concatenate([tensors[name] for tensors in sequences])) for name in names}
    return joined, [next(iter(times.values())) for times in lengths]


def _stack(states: Sequence[States | None], count: int) -> dict[str, Array]:
    """Stacks the states of all sequences to `[sequences, *shape]`, with zeros for a sequence without states."""
    if len(states) != count:
        raise ValueError(f"states: {len(states)} for {count} sequences: give one, or None, for each")
    arrays = [one and {name: to_tensor(state) for name, state in one.items()} for one in states]
    zeros = {name: np.zeros_like(state) for one in arrays if one for name, state in one.items()}
    stacked = {name: np.stack([one.get(name, zero) if one else zero for one in arrays]) for name, zero in zeros.items()}
    return {name: to_tensor(state) for name, state in stacked.items()}
