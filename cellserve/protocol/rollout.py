"""Rollouts, autoregressive generation, as JSON and as server-sent events."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cellserve.protocol.events import Event
from cellserve.protocol.http import HttpResponse
from cellserve.protocol.tensor_codec import read_y
from cellserve.tensors import Array, TensorLike, to_json


@dataclass(frozen=True, slots=True)
class Rollout:
    """Outputs of a rollout. Each was the session's next input, except the last, which the session has not read yet.

    Attributes:
        y: `[steps, *outputs]` float32, if the model outputs values.
        symbols: `[steps]` integers, if the model outputs symbols.
        labels: Names of the symbols, if the model has them.
        text: The labels joined, if each is a character.
    """

    y: Array | None
    symbols: Array | None
    labels: tuple[str, ...] | None
    text: str | None


class RolloutOutput(NamedTuple):
    """One output of a streamed rollout. It was the session's next input, unless it is the last.

    Attributes:
        position: Position of the session after the step that produced it.
        y: `[*outputs]` float32, if the model outputs values.
        symbol: An integer, if the model outputs symbols.
        label: Name of the symbol, if the model has labels: a character of the text, say.
    """

    position: int
    y: Array | None
    symbol: int | None
    label: str | None


def request_body(
    begin: str | TensorLike, steps: int, temperature: float | None, top_k: int | None, seed: int | None
) -> dict[str, Any]:
    """Returns the document that requests a rollout, without the position."""
    options = {"temperature": temperature, "top_k": top_k, "seed": seed}
    given: dict[str, Any] = {"text": begin} if isinstance(begin, str) else {"x": to_json(begin)}
    return {**given, "steps": steps} | {name: value for name, value in options.items() if value is not None}


def read_rollout(response: HttpResponse) -> Rollout:
    """Reads the answer to a rollout that was requested as a whole."""
    document = response.json()
    if "symbols" not in document:
        return Rollout(read_y(response.content), None, None, None)
    text = document.get("text")
    labels = tuple(text) if text is not None else document.get("labels")
    return Rollout(None, np.array(document["symbols"]), labels and tuple(labels), text)


def read_output(event: Event) -> RolloutOutput:
    """Reads an event; the one that ends a rollout has a position alone."""
    document = json.loads(event.data)
    y = read_y(event.data) if "y" in document else None
    return RolloutOutput(document["position"], y, document.get("symbol"), document.get("text", document.get("label")))
