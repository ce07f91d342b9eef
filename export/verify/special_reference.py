"""Keras's results on special numbers among ordinary ones, to compare converted models with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import numpy as np

from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.verify.keras_runs import DoubleSteps, KerasSteps, Tensors
from cellserve.export.verify.parity import (
    Difference,
    SingleSteps,
    Tensor,
    finite_rows,
    finite_so_far,
    judge,
    name_and_layer,
    normal_so_far,
    own_error_of,
    relative_error,
    tensors_of,
    true_steps,
)
from cellserve.export.verify.special_values import LARGE, draw_special
from cellserve.service.runtime.batch_invariance import Array
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import unpack


class SpecialReference:
    """Keras's results for special numbers among ordinary ones, in inputs and states.

    Where Keras is finite, ours must equal it: in single steps from Keras's states and in one run. Where it is not, ours
    must not be either, in an output or a next state: the service then refuses the request. Where float32 Keras itself,
    or its float64 twin with random rounding, is more than a hundredth off the exact twin, rounding decides which branch
    is taken, and the row is counted, not judged. Nothing is judged that follows from states beyond a million, which the
    gates of ONNX's recurrent operators are too coarse for, or from states below 1e-35.

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
        double: Callable[[], DoubleSteps | None],
        rng: np.random.Generator,
    ) -> None:
        self.network, self._keras, self._double = network, keras, double
        self.x, self.initial = draw_special(network.signature, keras.constants, rng)
        self.history = keras.history(unpack(self.x), self.initial)
        self.good = finite_so_far(self.history)
        self.single = SingleSteps(self.x, self.history, self.good)
        small = [
            (np.abs(state[:, :-1]) <= LARGE).reshape(*self.good.shape, -1).all(axis=2) for state in self.history[1]
        ]
        self.judged = np.logical_and.accumulate(np.logical_and.reduce(small), axis=1) & normal_so_far(self.history)
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
        error = np.where(judged, errors_of_rows(ours, true, good, finite), 0.0)
        places = [f"time step {step}" for step in steps]
        names = name_and_layer(self.network, tensor)
        found, unjudged = judge("special", error, lambda: own()[tensor], names, places)
        self.unjudged += unjudged
        return found

    def _errors(self, at: Array) -> dict[Tensor, Array]:
        """Float32 Keras's largest error so far in the whole run, of all rows at some steps, `[rows * len(at)]`."""
        found = {}
        for tensor in tensors_of(self.network):
            exact, *others = (true_steps(run, tensor) for run in self._histories)
            error = own_error_of(true_steps(self.history, tensor), exact, others)
            so_far = np.maximum.accumulate(error.reshape(*exact.shape[:2], -1).max(axis=2), axis=1)
            found[tensor] = so_far[:, at].ravel()
        return found

    def _single_errors(self) -> dict[Tensor, Array]:
        """Float32 Keras's error in each single step, `[n]`."""
        found = {}
        for tensor in tensors_of(self.network):
            place, index = (0, np.s_[:, 0]) if tensor.kind == "output" else (1, np.s_[:])
            exact, *others = (run[place][tensor.index][index] for run in self._double_steps)
            error = own_error_of(self.single.true(tensor), exact, others)
            found[tensor] = error.reshape(len(error), -1).max(axis=1)
        return found

    @cached_property
    def _histories(self) -> list[Tensors]:
        """The history in float64, exact and rounded at random; if it cannot be run so, the one in float32."""
        twin = self._double()
        return twin.histories(unpack(self.x), self.initial) if twin else [self.history]

    @cached_property
    def _double_steps(self) -> list[Tensors]:
        """The single steps in float64, exact and rounded at random; if they cannot be run so, those in float32."""
        given = unpack(self.single.x), self.single.before
        twin = self._double()
        return twin.steps(*given) if twin else [self._keras.step(*given)]


def errors_of_rows(ours: Array, true: Array, good: Array, finite: Array) -> Array:
    """The error of each row `[n]`: infinite where Keras is not finite (`~good`) and all of ours is (`finite`)."""
    error = relative_error(ours, true).reshape(len(true), -1).max(axis=1)
    return np.where(good, error, np.where(finite, np.inf, 0.0))
