"""What a session gives when it goes on by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cellserve.calls import Reply
from cellserve.numbers import Array, float32, y_of


@dataclass(frozen=True, slots=True)
class Rollout:
    """Outputs of a session that have been its next inputs; the last one has not been taken in yet.

    Attributes:
        y: `[steps, *outputs]` float32, of a model that gives values.
        symbols: `[steps]` integers, of a model that gives symbols.
        labels: Their names, where the model has them.
        text: The names in one, where each is a character.
    """

    y: Array | None
    symbols: Array | None
    labels: tuple[str, ...] | None
    text: str | None


def asked(
    begin: str | ArrayLike, steps: int, temperature: float | None, top_k: int | None, seed: int | None
) -> dict[str, Any]:
    """Makes the document that asks for one, without its position."""
    options = {"temperature": temperature, "top_k": top_k, "seed": seed}
    given: dict[str, Any] = {"text": begin} if isinstance(begin, str) else {"x": float32(begin).tolist()}
    return {**given, "steps": steps} | {name: value for name, value in options.items() if value is not None}


def read(reply: Reply) -> Rollout:
    """Reads an answer."""
    document = reply.json()
    if "symbols" not in document:
        return Rollout(y_of(reply.content), None, None, None)
    text = document.get("text")
    labels = tuple(text) if text is not None else document.get("labels")
    return Rollout(None, np.array(document["symbols"]), labels and tuple(labels), text)
