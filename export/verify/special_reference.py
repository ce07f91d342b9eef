"""Keras's results on special numbers among ordinary ones, to compare converted models with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.verify.keras_runs import KerasSteps, Tensors, double, run_together
from cellserve.export.verify.parity import (
    NUDGE,
    NUDGES,
    TOLERANCE,
    Difference,
    SingleSteps,
    Tensor,
    finite_rows,
    finite_so_far,
    limit_of,
    name_and_layer,
    relative_error,
    tensors_of,
    true_steps,
)
from cellserve.export.verify.special_values import LARGE, draw_special, nudged
from cellserve.service.runtime.batch_invariance import Array
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import unpack

LARGE_NUDGES, LARGE_NUDGE = 16, 2.0**-20  # of large numbers: a sum of them that cancels out is all rounding
OTHER_BRANCH = 1e-2  # an own error of Keras above this is no rounding: it took another branch than in float64
GATE_ERROR = 2.0**-22  # of sigmoid and tanh in ONNX Runtime's kernels: absolute, while Keras's is relative


class SpecialReference:
    """Keras's results for special numbers among ordinary ones, in inputs and states.

    Where Keras is finite, ours must equal it: in single steps from Keras's states and in one run. Where it is not, ours
    must not be either, in an output or a next state: the service then refuses the request. Where float32 Keras itself
    differs from its float64 twin by more than a hundredth, it took another branch, and the row is counted, not judged.
    A gate's error times the largest number that it may let through is allowed: a gate of nearly zero times 100 is off
    by 1e-5. Nothing is judged that follows from states beyond a million, of which that error is no longer small.

    Args:
        network: The network.
        keras: The network in Keras.
        double: Returns the network in float64, or None; called if it is needed.
        rng: Draws the numbers.
    """

    def __init__(
        self,
        network: StatefulNetwork,
        keras: KerasSteps,
        double: Callable[[], KerasSteps | None],
        rng: np.random.Generator,
    ) -> None:
        self.network, self._keras, self._double, self._rng = network, keras, double, rng
        self.x, self.initial = draw_special(network.signature, keras.constants, rng)
        self.history = keras.history(unpack(self.x), self.initial)
        self.good = finite_so_far(self.history)
        self.single = SingleSteps(self.x, self.history, self.good)
        small = [
            (np.abs(state[:, :-1]) <= LARGE).reshape(*self.good.shape, -1).all(axis=2) for state in self.history[1]
        ]
        self.judged = np.logical_and.accumulate(np.logical_and.reduce(small), axis=1)
        self.tolerance = tolerances([*unpack(self.x), *(state[:, :-1] for state in self.history[1])])
        self.unjudged = 0

    def differences(self, runtime: Runtime) -> Iterator[Difference]:
        """Runs a model on the special numbers and measures every tensor."""
        self.unjudged = 0
        y, after = runtime.run(self.single.x, self.single.lengths, self.single.before)
        finite = np.logical_and.reduce([finite_rows(each) for each in (*after, *unpack(y))])
        for tensor in tensors_of(self.network):
            ours = after[tensor.index] if tensor.kind == "state" else unpack(y)[tensor.index][:, 0]
            yield self._difference(
                tensor,
                ours,
                self.single.true(tensor),
                self.single.good,
                finite,
                self.single.of(self.judged),
                self.single.of(self.tolerance),
                self.single.steps,
                self._single_errors,
            )
        rows, steps = self.x.shape[0], np.arange(self.x.shape[1])
        y, final = runtime.run(self.x, np.full(rows, len(steps), np.int32), self.initial)
        finite = np.logical_and.reduce([finite_rows(each) for each in (*final, *unpack(y))])
        for tensor in tensors_of(self.network):
            true = true_steps(self.history, tensor)
            # The states after the last step; the outputs of all steps. A row is refused as a whole.
            at = steps[-1:] if tensor.kind == "state" else steps
            ours = final[tensor.index][:, None] if tensor.kind == "state" else unpack(y)[tensor.index]
            refused = ~self.good[:, -1:] & finite[:, None]
            yield self._difference(
                tensor,
                ours.reshape(-1, *ours.shape[2:]),
                true[:, at].reshape(-1, *true.shape[2:]),
                self.good[:, at].ravel(),
                np.broadcast_to(refused if tensor.kind == "state" else False, (rows, len(at))).ravel(),
                self.judged[:, at].ravel(),
                self.tolerance[:, at].ravel(),
                np.tile(at, rows),
                partial(self._errors, at),
            )

    def _difference(
        self,
        tensor: Tensor,
        ours: Array,
        true: Array,
        good: Array,
        finite: Array,
        judged: Array,
        tolerance: Array,
        steps: Array,
        own: Callable[[], dict[Tensor, Array]],
    ) -> Difference:
        """Measures `[n, ...]`.

        Args:
            tensor: The tensor.
            ours: Our results.
            true: Keras's.
            good: `[n]`, where Keras is finite.
            finite: `[n]`, where all of ours is finite.
            judged: `[n]`, where they are to be alike.
            tolerance: `[n]`, what they may differ by where Keras's own error is none.
            steps: `[n]`, the time steps.
            own: Returns float32 Keras's own error of each tensor, `[n]`; called if it is needed.
        """
        error = np.where(judged, errors_of_rows(ours, true, good, finite), 0.0)
        places = [f"time step {step}" for step in steps]
        found, unjudged = judge(error, tolerance, lambda: own()[tensor], name_and_layer(self.network, tensor), places)
        self.unjudged += unjudged
        return found

    def _errors(self, at: Array) -> dict[Tensor, Array]:
        """Float32 Keras's largest error so far in the whole run, of all rows at some steps, `[rows * len(at)]`."""
        found = {}
        for tensor in tensors_of(self.network):
            exact, large, near = ([true_steps(run, tensor) for run in runs] for runs in self._histories)
            error = own_error_of(true_steps(self.history, tensor), exact[0], large, near)
            so_far = np.maximum.accumulate(error.reshape(*exact[0].shape[:2], -1).max(axis=2), axis=1)
            found[tensor] = so_far[:, at].ravel()
        return found

    def _single_errors(self) -> dict[Tensor, Array]:
        """Float32 Keras's error in each single step, `[n]`."""
        found = {}
        for tensor in tensors_of(self.network):
            place, index = (0, np.s_[:, 0]) if tensor.kind == "output" else (1, np.s_[:])
            exact, large, near = ([run[place][tensor.index][index] for run in runs] for runs in self._double_steps)
            error = own_error_of(self.single.true(tensor), exact[0], large, near)
            found[tensor] = error.reshape(len(error), -1).max(axis=1)
        return found

    @cached_property
    def _histories(self) -> list[list[Tensors]]:
        """In float64: the history; those of different large numbers; those of slightly different ones."""
        twin = self._double() or self._keras
        return grouped(run_together(twin.history, variants_of(unpack(self.x), self.initial, self._rng)))

    @cached_property
    def _double_steps(self) -> list[list[Tensors]]:
        """In float64: the single steps; those of different large numbers; those of slightly different ones."""
        twin = self._double() or self._keras
        variants = variants_of(unpack(self.single.x), self.single.before, self._rng)
        return grouped(run_together(twin.step, variants))


def tolerances(let_through: Sequence[Array]) -> Array:
    """What may be off at each step, `[rows, steps]`, by the largest number so far that a gate may let through.

    Args:
        let_through: Inputs, and states before each step, `[rows, steps, ...]`. Numbers beyond a million do not count.
    """
    found = np.full(let_through[0].shape[:2], TOLERANCE)
    for array in let_through:
        if array.dtype.kind == "f":
            absolute = np.abs(array.astype(np.float64)).reshape(*found.shape, -1)
            largest = np.where(absolute <= LARGE, absolute, 0).max(axis=2, initial=0)
            found = np.maximum(found, TOLERANCE + GATE_ERROR * np.maximum.accumulate(largest, axis=1))
    return found


def errors_of_rows(ours: Array, true: Array, good: Array, finite: Array) -> Array:
    """The error of each row `[n]`: infinite where Keras is not finite (`~good`) and all of ours is (`finite`)."""
    error = relative_error(ours, true).reshape(len(true), -1).max(axis=1)
    return np.where(good, error, np.where(finite, np.inf, 0.0))


def judge(
    error: Array, limit: Array, own: Callable[[], Array], name_and_layer: tuple[str, str], places: Sequence[str]
) -> tuple[Difference, int]:
    """Judges the errors of one tensor on special numbers.

    Args:
        error: `[n]`.
        limit: `[n]`, what is allowed where Keras's own error is none.
        own: Returns float32 Keras's own errors, `[n]`; called if they are needed.
        name_and_layer: The names of the tensor and of the layer that it comes from.
        places: Where each error is.

    Returns:
        The worst difference; how many are not judged, because Keras took another branch than in float64.
    """
    unjudged = 0
    if (error > limit).any():
        own_error = own()
        other_branch = (own_error > OTHER_BRANCH) & (error > limit)
        unjudged = int(other_branch.sum())
        error, limit = np.where(other_branch, 0.0, error), np.maximum(limit, limit_of(own_error))
    worst = int(np.argmax(error / limit))
    what = "" if np.isfinite(error[worst]) else ", where Keras is not finite and ours is, or the other way round"
    share = float(error[worst] / limit[worst])
    value = float(error[worst] if share > 1 else error[error <= TOLERANCE].max(initial=0))
    return Difference(*name_and_layer, "special", value, share, places[worst] + what), unjudged


def variants_of(inputs: Sequence[Array], states: Sequence[Array], rng: np.random.Generator) -> list[Tensors]:
    """Numbers in float64: themselves, with large ones changed by more than rounding, and changed by rounding."""
    given = list(map(double, inputs)), list(map(double, states))
    changes = [(LARGE_NUDGE, LARGE)] * LARGE_NUDGES + [(NUDGE, 0.0)] * NUDGES
    return [given, *((nudged(given[0], rng, *each), nudged(given[1], rng, *each)) for each in changes)]


def grouped(runs: list[Any]) -> list[list[Any]]:
    """The results of `variants_of`: of the numbers themselves, of different large ones, of slightly different ones."""
    return [runs[:1], runs[1 : 1 + LARGE_NUDGES], runs[1 + LARGE_NUDGES :]]


def own_error_of(single: Array, exact: Array, large: Sequence[Array], near: Sequence[Array]) -> Array:
    """Float32 Keras's own error: that of its result, and what rounding would make of a slightly different one.

    A large effect of a small change is not counted: at a comparison's threshold nothing excuses the wrong branch.
    """
    error = np.maximum.reduce([relative_error(each, exact) for each in (single, *large)])
    rounding = np.maximum.reduce([relative_error(each, exact) for each in near])
    return np.maximum(error, np.where(rounding > OTHER_BRANCH, 0.0, rounding))
