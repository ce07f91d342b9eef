"""The JSON bodies that hold tensors, and the functions that read them, here or in the decoding process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from cellserve.service.errors import InvalidInput, excerpt
from cellserve.service.validation.json_input import TensorDecoder, decode, split

Array = NDArray[Any]
States = dict[str, Array]
Outputs = Literal["last", "all"]
Position = Annotated[int, msgspec.Meta(ge=0)]
Value = TypeVar("Value")

_LARGEST_SEED = 2**63 - 1
LEFT_OUT = msgspec.Raw(b"null")


class StepRequest(msgspec.Struct, Generic[Value], forbid_unknown_fields=True):
    """The body of `POST /sessions/{id}/step`."""

    x: Value
    outputs: Outputs | None = None
    position: Position | None = None


class PredictRequest(msgspec.Struct, Generic[Value], forbid_unknown_fields=True):
    """The body of `POST /predict`."""

    sequences: Value
    model: str | None = None
    outputs: Outputs | None = None
    states: msgspec.Raw = LEFT_OUT
    return_states: bool = False


class CreateRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /sessions` and `PUT /sessions/{id}`."""

    model: str | None = None
    states: msgspec.Raw = LEFT_OUT


class RolloutRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /sessions/{id}/rollout`."""

    steps: Annotated[int, msgspec.Meta(ge=1)]
    x: msgspec.Raw = LEFT_OUT
    text: str | None = None
    position: Position | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=1)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=_LARGEST_SEED)] | None = None
    stream: bool = False


_step_decoder = msgspec.json.Decoder(StepRequest[msgspec.Raw])
_predict_decoder = msgspec.json.Decoder(PredictRequest[msgspec.Raw])
_create_decoder = msgspec.json.Decoder(CreateRequest)
_rollout_decoder = msgspec.json.Decoder(RolloutRequest)


class Prediction(NamedTuple):
    """A decoded prediction."""

    x: Array  # [time steps of all sequences, *features]
    lengths: list[int]
    states: list[States | None] | None
    outputs: Outputs | None
    return_states: bool

    @property
    def sequences(self) -> Sequence[Array]:
        """The sequences, each `[time, *features]`."""
        return split(self.x, self.lengths)


def read_step(reader: TensorDecoder, body: bytes) -> tuple[Array, bool, Outputs | None, int | None]:
    """Returns x `[time, *features]`, whether it had no time axis, the requested outputs and the position."""
    request = decode(_step_decoder, body)
    return *reader.x(request.x), request.outputs, request.position


def model_of_prediction(body: bytes) -> str | None:
    """Returns the name of a prediction's model; None means the only model."""
    return decode(_predict_decoder, body).model


def read_prediction(reader: TensorDecoder, most: int, body: bytes) -> Prediction:
    """Decodes a prediction of at most so many sequences; raises InvalidInput, NotJson or BodyTooLarge."""
    request = decode(_predict_decoder, body)
    sequences = reader.sequences(request.sequences, most)
    if not sequences:
        raise InvalidInput("sequences: empty: send at least one sequence", place="sequences")
    states = None if request.states == LEFT_OUT else reader.states(request.states, len(sequences))
    lengths = list(map(len, sequences))
    x = sequences[0] if len(sequences) == 1 else np.concatenate(sequences)
    return Prediction(x, lengths, states, request.outputs, request.return_states)


def model_of_creation(body: bytes) -> str | None:
    """Returns the name of a new session's model; None means the only model."""
    return decode(_create_decoder, body).model


def read_states(reader: TensorDecoder, body: bytes) -> States | None:
    """Returns the states of a new session; None for zeros."""
    states = decode(_create_decoder, body).states
    return None if states == LEFT_OUT else reader.state(states)


def read_rollout(reader: TensorDecoder, letters: tuple[str, ...] | None, body: bytes) -> tuple[RolloutRequest, Array]:
    """Returns a rollout, without its x and text, and its first time steps `[time, *features]`.

    Args:
        reader: The model's decoder.
        letters: The characters that the model's symbols are; None if they are none.
        body: The body.
    """
    request = decode(_rollout_decoder, body)
    has_x = request.x != LEFT_OUT
    if has_x == (request.text is not None):
        raise InvalidInput("x: send the first time steps, either as x or as text", place="x")
    x = reader.x(request.x)[0] if has_x else _symbols(reader, letters, request.text or "")
    request.x, request.text = LEFT_OUT, None
    return request, x


def _symbols(reader: TensorDecoder, letters: tuple[str, ...] | None, text: str) -> Array:
    if letters is None:
        raise InvalidInput("text: the model's symbols are not characters: send x", place="text")
    if not text:
        raise InvalidInput("text: empty: send at least one character", place="text")
    known, given = (np.frombuffer(one.encode("utf-32-le", "surrogatepass"), "<u4") for one in ("".join(letters), text))
    order = np.argsort(known)
    found = order[np.minimum(np.searchsorted(known, given, sorter=order), len(known) - 1)]
    wrong = known[found] != given
    if wrong.any():
        place = int(np.argmax(wrong))
        raise InvalidInput(
            f"text[{place}]: {excerpt(text[place])!r} is not one of the model's characters: "
            f"send some of {''.join(letters)!r}",
            place=f"text[{place}]",
        )
    return reader.symbols(found)
