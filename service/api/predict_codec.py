"""JSON of predictions: requests of whole sequences to arrays, results to answers."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

import msgspec
from numpy.typing import NDArray

from cellserve.service.api.step_codec import labels_json
from cellserve.service.model_repository.model import Model
from cellserve.service.validation.json_input import decode

Array = NDArray[Any]
S = TypeVar("S")


class PredictRequest(msgspec.Struct, Generic[S], forbid_unknown_fields=True):
    """The body of `POST /predict`."""

    sequences: S
    model: str | None = None
    outputs: Literal["last", "all"] | None = None
    states: msgspec.Raw = msgspec.Raw(b"null")
    return_states: bool = False


_decoder = msgspec.json.Decoder(PredictRequest[msgspec.Raw])
_simple_decoder = msgspec.json.Decoder(PredictRequest[list[list[list[float]]]])
_parts_decoder = msgspec.json.Decoder(PredictRequest[list[msgspec.Raw]])


def parse_simple_prediction(body: bytes) -> PredictRequest[list[list[list[float]]]]:
    """Parses the most common request, sequences of plain numbers, in one pass.

    Raises:
        NOT_SIMPLE: The body is not such a request; `read_prediction` says why.
    """
    return _simple_decoder.decode(body)


def read_prediction(body: bytes) -> PredictRequest[msgspec.Raw]:
    """Parses a request of any form, its sequences and states still JSON; raises InvalidInput or NotJson."""
    return decode(_decoder, body)


def read_prediction_in_parts(body: bytes) -> PredictRequest[list[msgspec.Raw]]:
    """Parses a request of any form, each of its sequences still JSON; raises InvalidInput or NotJson."""
    return decode(_parts_decoder, body)


def wants_every_output(model: Model, outputs: str | None) -> bool:
    """Whether the outputs of all time steps are requested; `outputs` is `last`, `all` or None, the model's default."""
    return (outputs or model.document.signature.default_output) == "all"


def prediction_json(
    model: Model, outputs: list[Array], every_output: bool, states: list[dict[str, Array]] | None
) -> dict[str, Any]:
    """Returns the answer for sequences with the outputs `[time, *outputs]` each, as JSON; with their final states."""
    wanted = outputs if every_output else [y[-1] for y in outputs]
    answer: dict[str, Any] = {"model": model.name, "version": model.version}
    answer["outputs"] = [model.outputs.to_json(y) for y in wanted]
    answer |= labels_json(model.document, wanted)
    if states is not None:
        # orjson writes NumPy scalars, but not arrays without axes.
        answer["states"] = [{name: s if s.ndim else s[()] for name, s in own.items()} for own in states]
    return answer
