"""What the tests of `cellserve adopt` share: a plain loop over ONNX Runtime, written as a user would write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from cellserve.service.model_repository.model import Model

Adopt = Callable[..., Model]  # adopts a graph with flags, and opens what was written
ROWS, STEPS = 3, 6


def drawn(model: Model, seed: int = 3) -> np.ndarray:
    """Steps of random numbers for a model of one input, `[ROWS, STEPS, *shape]`; integers within its bounds."""
    (spec,) = model.document.signature.inputs
    rng = np.random.default_rng(seed)
    shape = (ROWS, STEPS, *spec.shape)
    if spec.bounds:
        return rng.integers(spec.bounds[0], spec.bounds[1], shape, spec.dtype, endpoint=True)
    return rng.normal(size=shape).astype(spec.dtype)


def assert_served_as_in_a_plain_loop(
    model: Model,
    made: Any,
    native: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    states: Mapping[str, tuple[str, np.ndarray]],
    atol: float = 1e-5,
) -> None:
    """Steps rows together in the model as it is served, and one by one in the graph as it was.

    Args:
        model: The adopted model, of one input and one output.
        made: The graph as it was.
        native: Makes the graph's inputs of one row's step `[*shape]`.
        states: Each state with its next one and its first value, for one row.
        atol: Largest difference between the two.
    """
    x = drawn(model)
    y, _ = model.runtime.run(x, np.full(ROWS, STEPS, np.int32), model.runtime.zeros(ROWS))
    session = ort.InferenceSession(made.SerializeToString())
    output = model.document.signature.outputs[0].name
    for row in range(ROWS):
        own = {name: first for name, (_, first) in states.items()}
        for t in range(STEPS):
            names = [output, *(following for following, _ in states.values())]
            wanted, *moved = session.run(names, {**native(x[row, t]), **own})
            own = dict(zip(states, moved, strict=True))
            np.testing.assert_allclose(y[row, t].ravel(), wanted.astype(np.float64).ravel(), atol=atol)
