"""JSON of predictions: requests of whole sequences to arrays, results to answers."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cellserve.service.api.step_codec import labels_of
from cellserve.service.model_repository.model import Model
from cellserve.service.validation.json_bodies import PredictRequest

Array = NDArray[Any]


_decoder = msgspec.json.Decoder(PredictRequest[msgspec.Raw])


def parse_prediction(body: bytes) -> PredictRequest[msgspec.Raw]:
    """Parses a request up to its sequences.

    Raises:
        NOT_SIMPLE: It cannot be parsed; `json_bodies.read_prediction` says why.
    """
    return _decoder.decode(body)


def wants_every_output(model: Model, outputs: str | None) -> bool:
    """Whether the outputs of all time steps are requested; `outputs` is `last`, `all` or None, the model's default."""
    return (outputs or model.document.signature.default_output) == "all"


def prediction_json(
    model: Model, outputs: list[Array], every_output: bool, states: list[dict[str, Array]] | None
) -> dict[str, Any]:
    """Returns the answer for sequences with the outputs `[time, *outputs]` each, as JSON; with their final states."""
    # NumPy is called once for all sequences: thousands of calls would hold up the event loop for 20 ms.
    wanted = outputs if every_output else [y[-1:] for y in outputs]
    answer: dict[str, Any] = {"model": model.name, "version": model.version}
    if every_output:
        answer["outputs"] = [model.outputs.to_json(y) for y in outputs]
    else:
        last = np.concatenate(wanted)
        answer["outputs"] = last if last.dtype.names is None else [model.outputs.to_json(y) for y in last]
    if model.document.labels is not None:
        labels = labels_of(model.document.labels, np.concatenate(wanted))
        ends = accumulate(map(len, outputs))
        answer["labels"] = (
            [labels[end - len(y) : end] for y, end in zip(outputs, ends, strict=True)] if every_output else labels
        )
    if states is not None:
        # orjson writes NumPy scalars, but not arrays without axes.
        answer["states"] = [{name: s if s.ndim else s[()] for name, s in own.items()} for own in states]
    return answer
