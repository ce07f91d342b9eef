"""Keras's results on special numbers among ordinary ones, to compare converted models with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial

import numpy as np

from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.verify.keras_runs import History, KerasSteps, double
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


class SpecialReference:
    """Keras's results for special numbers among ordinary ones, in inputs and states.

    Where Keras is finite, ours must equal it: in single steps from Keras's states and in one run. Where it is not, ours
    must not be either, in an output or a next state: the service then refuses the request. Where float32 Keras itself
    differs from its float64 twin by more than a hundredth, it took another branch, and the row is counted, not judged.
    Nothing is judged that follows from states beyond a million (a sum of such numbers, say): what gates of nearly zero,
    which kernels round to 1e-7, let through of them is no longer small.

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
            steps: `[n]`, the time steps.
            own: Returns float32 Keras's own error of each tensor, `[n]`; called if it is needed.
        """
        error = relative_error(ours, true).reshape(len(true), -1).max(axis=1)
        error = np.where(judged, np.where(good, error, np.where(finite, np.inf, 0.0)), 0.0)
        limit = np.full(len(error), TOLERANCE)
        if (error > TOLERANCE).any():
            own_error = own()[tensor]
            other_branch = (own_error > OTHER_BRANCH) & (error > TOLERANCE)
            self.unjudged += int(other_branch.sum())
            error, limit = np.where(other_branch, 0.0, error), limit_of(own_error)
        worst = int(np.argmax(error / limit))
        name, layer = name_and_layer(self.network, tensor)
        what = "" if good[worst] else ", where Keras is not finite and ours is"
        share, where = float(error[worst] / limit[worst]), f"time step {steps[worst]}{what}"
        value = float(error[worst] if share > 1 else np.where(limit <= TOLERANCE, error, 0).max())
        return Difference(name, layer, "special", value, share, where)

    def _errors(self, at: Array) -> dict[Tensor, Array]:
        """Float32 Keras's largest error so far in the whole run, of all rows at some steps, `[rows * len(at)]`."""
        found = {}
        for tensor in tensors_of(self.network):
            exact, large, near = ([true_steps(run, tensor) for run in runs] for runs in self._histories)
            error = _own_error(true_steps(self.history, tensor), exact[0], large, near)
            so_far = np.maximum.accumulate(error.reshape(*exact[0].shape[:2], -1).max(axis=2), axis=1)
            found[tensor] = so_far[:, at].ravel()
        return found

    def _single_errors(self) -> dict[Tensor, Array]:
        """Float32 Keras's error in each single step, `[n]`."""
        found = {}
        for tensor in tensors_of(self.network):
            place, index = (0, np.s_[:, 0]) if tensor.kind == "output" else (1, np.s_[:])
            exact, large, near = ([run[place][tensor.index][index] for run in runs] for runs in self._double_steps)
            error = _own_error(self.single.true(tensor), exact[0], large, near)
            found[tensor] = error.reshape(len(error), -1).max(axis=1)
        return found

    @cached_property
    def _histories(self) -> list[list[History]]:
        """In float64: the history; those of different large numbers; those of slightly different ones."""
        twin = self._double() or self._keras
        return [[twin.history(*each) for each in runs] for runs in self._variants(unpack(self.x), self.initial)]

    @cached_property
    def _double_steps(self) -> list[list[tuple[list[Array], list[Array]]]]:
        """In float64: the single steps; those of different large numbers; those of slightly different ones."""
        twin = self._double() or self._keras
        variants = self._variants(unpack(self.single.x), self.single.before)
        return [[twin.step(*each) for each in runs] for runs in variants]

    def _variants(self, inputs: Sequence[Array], states: Sequence[Array]) -> list[list[list[list[Array]]]]:
        given = list(map(double, inputs)), list(map(double, states))
        large = [[nudged(each, self._rng, LARGE_NUDGE, LARGE) for each in given] for _ in range(LARGE_NUDGES)]
        near = [[nudged(each, self._rng, NUDGE) for each in given] for _ in range(NUDGES)]
        return [[list(given)], large, near]


def _own_error(single: Array, exact: Array, large: Sequence[Array], near: Sequence[Array]) -> Array:
    """Float32 Keras's own error: that of its result, and what rounding would make of a slightly different one.

    A large effect of a small change is not counted: at a comparison's threshold nothing excuses the wrong branch.
    """
    error = np.maximum.reduce([relative_error(each, exact) for each in (single, *large)])
    rounding = np.maximum.reduce([relative_error(each, exact) for each in near])
    return np.maximum(error, np.where(rounding > OTHER_BRANCH, 0.0, rounding))
