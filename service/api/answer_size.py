"""The size of an answer, known from its request: what would be too large is refused before the work."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cellserve.service.errors import BodyTooLarge
from cellserve.service.model_repository.model import Model
from cellserve.service.runtime.tensor_layout import json_bytes

LARGE = 256 * 1024  # bytes; larger answers are encoded and sent in parts


def check_json_answer(
    limit: int, model: Model, inputs: Iterable[NDArray[np.generic]], steps: int, states: int = 0
) -> int:
    """Returns the bytes of an answer in JSON, at most: all numbers, and labels, at their longest.

    Args:
        limit: Bytes that the inputs and the answer may have together.
        model: The model.
        inputs: The request's inputs.
        steps: Time steps of outputs in the answer, over all rows.
        states: Rows of states in the answer.

    Raises:
        BodyTooLarge: They would have too many bytes together.
    """
    labels = model.document.labels
    label = 0 if labels is None else max(map(len, labels)) + 3
    size = steps * (model.outputs.json_bytes + label)
    if states:
        size += states * sum(json_bytes(spec) + len(spec.name) + 4 for spec in model.runtime.signature.states)
    check_exchange(limit, inputs, size)
    return size


def check_binary_answer(
    limit: int, model: Model, inputs: Iterable[NDArray[np.generic]], steps: int, states: int = 0
) -> int:
    """Returns the bytes of an answer in binary; arguments and errors are those of `check_json_answer`."""
    size = steps * model.outputs.step_bytes
    if states:
        specs = model.runtime.signature.states
        size += states * sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs)
    check_exchange(limit, inputs, size)
    return size


def check_exchange(limit: int, inputs: Iterable[NDArray[np.generic]], answer: int) -> None:
    """Raises BodyTooLarge if a request's inputs and its answer have too many bytes together."""
    if sum(x.nbytes for x in inputs) + answer > limit:
        raise BodyTooLarge(
            f"the answer would have up to {answer} bytes: it and the inputs may have {limit} together: send fewer time "
            f"steps in a request, or ask for outputs last",
            limit=limit,
        )
