"""What a converted model's results differ by from Keras's, and by how much they may.

The tolerance is `|ours - Keras| <= 1e-5 * max(1, |Keras|)`. If float32 Keras itself differs by more than that from a
float64 run (the network amplifies rounding), the limit is four times Keras's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cellserve.export.keras_model import keras_private
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.verify.keras_runs import History
from cellserve.service.runtime.batch_invariance import Array
from cellserve.service.runtime.tensor_layout import unpack

TOLERANCE = 1e-5
KERAS_FLOAT32_ERROR_FACTOR = 4.0  # allowed error, as a multiple of float32 Keras's own
SMALL = 1e-35  # of a state's entries that are not 0: what comes of smaller ones is not judged
OTHER_BRANCH = 1e-2  # an own error of Keras above this is no rounding: it took another branch than in float64


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference of one tensor from Keras's."""

    tensor: str
    layer: str
    run: str  # how it was run: steps, whole, chunks, model
    value: float  # largest |ours - Keras| / max(1, |Keras|)
    share: float  # fraction of the allowed difference at the worst place; above 1 the check has failed
    where: str


@dataclass(frozen=True, slots=True)
class Parity:
    """All differences from Keras, in the order of the network."""

    differences: tuple[Difference, ...]
    keras_float32_error: float  # float32 Keras's error against float64; 0 if the limit did not need it
    rows: int
    time_steps: int
    by_step: tuple[tuple[int, float], ...]  # (time step or length, largest difference of the outputs there), in one run
    unjudged: int  # single steps on ordinary numbers in which rounding decides which branch is taken
    special_unjudged: int  # the same on special numbers

    @property
    def failed(self) -> list[Difference]:
        """The differences above the limit; the first names the layer to look at."""
        return [difference for difference in self.differences if not difference.share <= 1]

    def figures(self) -> dict[str, Any]:
        """Returns the figures for the model file."""
        worst: dict[str, float] = {}
        for difference in self.differences:
            worst[difference.run] = max(worst.get(difference.run, 0.0), difference.value)
        figures = {"tolerance": TOLERANCE, "time_steps": self.time_steps, "rows": self.rows, **worst}
        return {
            **figures,
            "keras_float32_error": self.keras_float32_error,
            "unjudged": self.unjudged,
            "special_unjudged": self.special_unjudged,
        }


@dataclass(frozen=True, slots=True)
class Tensor:
    """One compared tensor of a network."""

    kind: Literal["state", "output"]
    index: int  # its place among the network's states, or among its outputs


def tensors_of(network: StatefulNetwork) -> list[Tensor]:
    """All compared tensors of a network, states first."""
    states = [Tensor("state", index) for index in range(len(network.states))]
    return states + [Tensor("output", index) for index in range(len(network.outputs))]


def true_steps(history: History, tensor: Tensor) -> Array:
    """One tensor of a history after each step, `[rows, steps, ...]`."""
    return history[0][tensor.index] if tensor.kind == "output" else history[1][tensor.index][:, 1:]


def name_and_layer(network: StatefulNetwork, tensor: Tensor) -> tuple[str, str]:
    """The name of a tensor and of the layer that it comes from."""
    if tensor.kind == "state":
        named = [(state.name, recurrence.layer) for recurrence in network.recurrences for state in recurrence.states]
        return named[tensor.index]
    layer = keras_private.producer(network.model.outputs[tensor.index]).name
    return network.outputs[tensor.index].name, layer


def relative_error(ours: Array, true: Array) -> Array:
    """`|ours - true| / max(1, |true|)`; infinite where only one of the two is finite, 0 where neither is."""
    ours, true = ours.astype(np.float64), true.astype(np.float64)
    finite = np.isfinite(ours), np.isfinite(true)
    with np.errstate(all="ignore"):
        error = np.abs(ours - true) / np.maximum(1, np.abs(true))
    return np.where(finite[0] & finite[1], error, np.where(finite[0] | finite[1], np.inf, 0.0))


def exceeds(ours: Array, true: Array) -> bool:
    """Whether any difference is beyond the tolerance for float32."""
    return bool((relative_error(ours, true) > TOLERANCE).any())


def limit_of(error: Array) -> Array:
    """The largest difference allowed where float32 Keras's own error is as given."""
    return np.asarray(np.maximum(TOLERANCE, KERAS_FLOAT32_ERROR_FACTOR * error))


def own_error_of(single: Array, exact: Array, others: Sequence[Array]) -> Array:
    """Float32 Keras's own error: that of its result, and of what rounding would make of it.

    Args:
        single: Keras's result in float32.
        exact: Its result in float64.
        others: Its results in float64 with random rounding.
    """
    return np.asarray(np.maximum.reduce([relative_error(each, exact) for each in (single, *others)]))


def judge(
    run: str,
    error: Array,
    own: Callable[[], Array],
    name_and_layer: tuple[str, str],
    places: Sequence[str],
) -> tuple[Difference, int]:
    """Judges the errors of one tensor, row by row.

    Args:
        run: What was run.
        error: `[n]`.
        own: Returns float32 Keras's own errors, `[n]`; called if they are needed.
        name_and_layer: The names of the tensor and of the layer that it comes from.
        places: Where each error is.

    Returns:
        The worst difference; how many are not judged, because rounding decides which branch is taken.
    """
    unjudged, limit = 0, np.full(len(error), TOLERANCE)
    if (error > limit).any():
        own_error = own()
        other_branch = (own_error > OTHER_BRANCH) & (error > limit)
        unjudged = int(other_branch.sum())
        error, limit = np.where(other_branch, 0.0, error), limit_of(own_error)
    worst = int(np.argmax(error / limit))
    what = "" if np.isfinite(error[worst]) else ", where Keras is not finite and ours is, or the other way round"
    share = float(error[worst] / limit[worst])
    # Large numbers differ by much that only looks like an error.
    value = float(error.max() if share > 1 or run != "special" else error[error <= TOLERANCE].max(initial=0))
    return Difference(*name_and_layer, run, value, share, places[worst] + what), unjudged


def finite_rows(array: Array) -> Array:
    """Where all entries of a row are finite, `[rows]`."""
    return np.asarray(np.isfinite(array).reshape(len(array), -1).all(axis=1))


def finite_so_far(history: History) -> Array:
    """Where all outputs and states of a history are finite and have been in all steps before, `[rows, steps]`."""
    tensors = [*history[0], *(state[:, 1:] for state in history[1])]
    finite = [np.isfinite(each).reshape(*each.shape[:2], -1).all(axis=2) for each in tensors]
    return np.logical_and.accumulate(np.logical_and.reduce(finite), axis=1)


def normal_so_far(history: History) -> Array:
    """Where no state has come so near 0 that its products are not float32's normal numbers, `[rows, steps]`.

    TensorFlow takes those for 0, ONNX Runtime not everywhere: a comparison with 0 tells them apart.
    """
    before = [np.abs(state[:, :-1]) for state in history[1]]
    normal = [((each == 0) | ~(each < SMALL)).reshape(*each.shape[:2], -1).all(axis=2) for each in before]
    return np.logical_and.accumulate(np.logical_and.reduce(normal), axis=1)


class SingleSteps:
    """All single steps of a history from states that are finite, as one batch.

    Args:
        x: The inputs `[rows, steps, ...]`.
        history: Keras's history of them.
        good: `[rows, steps]`, where Keras has been finite so far.
    """

    def __init__(self, x: Array, history: History, good: Array) -> None:
        rows, steps = x.shape[:2]
        begins = np.concatenate([np.ones((rows, 1), bool), good[:, :-1]], axis=1)
        self.steps = np.broadcast_to(np.arange(steps), good.shape)[begins]
        self.x = np.ascontiguousarray(x[begins][:, None])
        self.lengths = np.ones(len(self.x), np.int32)
        self.before = [np.ascontiguousarray(state[:, :-1][begins]) for state in history[1]]
        self.good = good[begins]
        self._history, self._begins = history, begins

    def of(self, by_step: Array) -> Array:
        """The entries of `[rows, steps, ...]` that belong to these steps."""
        return np.asarray(by_step[self._begins])

    def true(self, tensor: Tensor) -> Array:
        """Keras's results of one tensor."""
        return self.of(true_steps(self._history, tensor))

    def compared(self, y: Array, after: Sequence[Array]) -> Iterator[tuple[Tensor, Array, Array]]:
        """Yields each tensor with our results and Keras's, states first; the rows that Keras has finite."""
        for index, state in enumerate(after):
            tensor = Tensor("state", index)
            yield tensor, state[self.good], self.true(tensor)[self.good]
        for index, part in enumerate(unpack(y)):
            tensor = Tensor("output", index)
            yield tensor, part[:, 0][self.good], self.true(tensor)[self.good]
