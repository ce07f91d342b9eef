"""Keras's results on ordinary numbers, to compare converted models with: over long runs, in chunks, padded, by step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial

import numpy as np

from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.verify.keras_runs import (
    DoubleSteps,
    KerasSteps,
    Tensors,
    double_of,
    run_network,
    run_saved_model,
    run_saved_model_in_double,
)
from cellserve.export.verify.parity import (
    OTHER_BRANCH,
    TOLERANCE,
    Difference,
    Parity,
    SingleSteps,
    Tensor,
    exceeds,
    finite_so_far,
    judge,
    limit_of,
    name_and_layer,
    normal_so_far,
    own_error_of,
    relative_error,
    tensors_of,
    true_steps,
)
from cellserve.export.verify.special_reference import SpecialReference
from cellserve.service.runtime.batch_invariance import Array, random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import TensorLayout, unpack

ROWS, STEPS = 16, 208


class Reference:
    """Keras's results for random states, inputs and lengths, kept to compare several candidates with.

    Args:
        network: The Keras network.
        seed: Seed of the random numbers.
    """

    def __init__(self, network: StatefulNetwork, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.network, self.signature = network, network.signature
        self.keras = KerasSteps(network)
        self.x, self.initial = random_inputs(self.signature, ROWS, STEPS, rng)
        self.lengths = rng.integers(1, STEPS + 1, ROWS).astype(np.int32)
        self.lengths[0] = STEPS
        self.cuts = [0, *np.sort(rng.choice(np.arange(1, STEPS), 12, replace=False)), STEPS]
        self.history = self.keras.history(unpack(self.x), self.initial)
        # Where Keras is finite, and has been from the start: what comes after a number that is not is never served.
        self.good = finite_so_far(self.history) & normal_so_far(self.history)
        self.single = SingleSteps(self.x, self.history, self.good)
        self.valid = (np.arange(STEPS) < self.lengths[:, None]) & self.good
        padded = np.arange(STEPS) < self.lengths[:, None]
        self.y, self.final = run_network(network, unpack(self.x), self.initial, padded)
        self.model_x, self.model_y = self._keras_model()
        self.special = SpecialReference(network, self.keras, lambda: self._double, rng)
        self.keras_float32_error, self.unjudged = 0.0, 0
        self.allow_float32_error = True

    def compare(self, runtime: Runtime, allow_float32_error: bool = True) -> Parity:
        """Runs a model whole, in chunks and in single steps from Keras's states, and measures every tensor.

        Args:
            runtime: The model.
            allow_float32_error: Whether float32 Keras's own error may raise the limit. Pass False for lower precision,
                to which no limit applies and which is not compared on special numbers.
        """
        self.keras_float32_error, self.unjudged, self.allow_float32_error = 0.0, 0, allow_float32_error
        y, final = runtime.run(self.x, self.lengths, self.initial)
        by_step = self._by_step(y)
        whole = list(self._differences("whole", y, final))
        y, final = self._in_chunks(runtime)
        chunks = list(self._differences("chunks", y, final))
        steps = list(self._step_differences(runtime))
        model = list(self._model_differences(runtime))
        special = list(self.special.differences(runtime)) if allow_float32_error else []
        differences = (*steps, *whole, *chunks, *model, *special)
        unjudged = self.unjudged, self.special.unjudged
        return Parity(differences, self.keras_float32_error, ROWS, STEPS, by_step, *unjudged)

    @cached_property
    def _double(self) -> DoubleSteps | None:
        return double_of(self.network)

    def _by_step(self, y: Array) -> tuple[tuple[int, float], ...]:
        worst = np.zeros(STEPS)
        for ours, true in zip(unpack(y), self.y, strict=True):
            error = relative_error(ours, true).reshape(*self.valid.shape, -1).max(axis=2)
            worst = np.maximum(worst, np.where(self.valid, error, 0).max(axis=0))
        return tuple(enumerate(worst.tolist(), 1))

    def _keras_model(self) -> tuple[Array, list[Array]]:
        """Runs the saved model itself in Keras, from zeros, over as many rows and steps as it takes.

        This catches a network that was taken apart wrongly. Returns the input and the outputs.
        """
        model = self.network.original
        rows, steps = model.inputs[0].shape[:2]
        x = self.x[np.arange(rows or ROWS) % ROWS, : steps or STEPS]
        return x, run_saved_model(model, unpack(x))

    def _in_chunks(self, runtime: Runtime) -> tuple[Array, list[Array]]:
        """Runs our model chunk by chunk, each row until its length is reached."""
        y = TensorLayout(self.signature.outputs).zeros(ROWS, STEPS)
        states = [state.copy() for state in self.initial]
        for start, stop in zip(self.cuts, self.cuts[1:], strict=False):
            rows = np.flatnonzero(self.lengths > start)
            lengths = np.minimum(self.lengths[rows], stop).astype(np.int32) - np.int32(start)
            x = np.ascontiguousarray(self.x[rows, start:stop])
            y[rows, start:stop], after = runtime.run(x, lengths, [state[rows] for state in states])
            for state, new in zip(states, after, strict=True):
                state[rows] = new
        return y, states

    def _differences(self, run: str, y: Array, final: list[Array]) -> Iterator[Difference]:
        last_steps = self.lengths - 1
        ended_well = self.good[np.arange(ROWS), last_steps]
        if ended_well.any():
            for index, state in enumerate(final):
                tensor = Tensor("state", index)
                ours, true, ends = state[ended_well], self.final[index][ended_well], last_steps[ended_well]
                yield self._difference(run, tensor, ours, true, ends, self._stepwise_limit(tensor, ours, true)[ends])
        steps = np.broadcast_to(np.arange(STEPS), self.valid.shape)[self.valid]
        for index, (part, true_part) in enumerate(zip(unpack(y), self.y, strict=True)):
            tensor, ours, true = Tensor("output", index), part[self.valid], true_part[self.valid]
            yield self._difference(run, tensor, ours, true, steps, self._stepwise_limit(tensor, ours, true)[steps])

    def _step_differences(self, runtime: Runtime) -> Iterator[Difference]:
        """Compares single steps from Keras's states: errors do not add up, so the layer that is wrong shows itself."""
        single = self.single
        y, after = runtime.run(single.x, single.lengths, single.before)
        places = [f"time step {step}" for step in single.steps[single.good]]
        for tensor, ours, true in single.compared(y, after):
            error = relative_error(ours, true).reshape(len(true), -1).max(axis=1)
            own = partial(self._single_step_errors, tensor)
            found, unjudged = judge("steps", error, own, name_and_layer(self.network, tensor), places)
            self.unjudged += unjudged
            yield found

    @cached_property
    def _double_single_steps(self) -> list[Tensors]:
        """The single steps in float64, exact and rounded at random; none if it cannot be run in float64."""
        given = unpack(self.single.x), self.single.before
        return [] if self._double is None else self._double.steps(*given)

    def _single_step_errors(self, tensor: Tensor) -> Array:
        """Float32 Keras's error in the single steps that it has finite, `[n]`; one for all where it is but rounding."""
        single = self.single
        if not self._double_single_steps or not self.allow_float32_error:
            return np.zeros(int(single.good.sum()))
        place, index = (0, np.s_[:, 0]) if tensor.kind == "output" else (1, np.s_[:])
        exact, *others = (run[place][tensor.index][index] for run in self._double_single_steps)
        error = own_error_of(single.true(tensor), exact, others).reshape(len(exact), -1).max(axis=1)[single.good]
        rounding = float(error[error <= OTHER_BRANCH].max(initial=0))
        self.keras_float32_error = max(self.keras_float32_error, rounding)
        return np.asarray(np.maximum(error, rounding))

    def _model_differences(self, runtime: Runtime) -> Iterator[Difference]:
        rows, time = self.model_x.shape[:2]
        y, _ = runtime.run(np.ascontiguousarray(self.model_x), np.full(rows, time, np.int32), runtime.zeros(rows))
        for index, (ours, true) in enumerate(zip(unpack(y), self.model_y, strict=True)):
            steps = np.tile(np.arange(time), rows)
            if not self.network.timed[index]:
                ours, steps = ours[:, -1], steps[time - 1 :: time]
            shape = (len(steps), *self.signature.outputs[index].shape)
            ours, true = ours.reshape(shape), true.reshape(shape)
            finite = np.isfinite(true).reshape(len(true), -1).all(axis=1)
            if not finite.any():
                continue
            limit = np.full(len(true), TOLERANCE)
            runs = self._double_models if self.allow_float32_error and exceeds(ours[finite], true[finite]) else []
            if runs and self.network.timed[index]:
                finite &= self._normal_model_steps.ravel()
            if runs:
                exact, *others = (run[index].reshape(shape) for run in runs)
                errors = own_error_of(true, exact, others)
                errors = _largest_so_far(errors.reshape(len(true), -1).max(axis=1), steps)
                self.keras_float32_error = max(self.keras_float32_error, float(errors.max()))
                limit = limit_of(errors)
            yield self._difference(
                "model", Tensor("output", index), ours[finite], true[finite], steps[finite], limit[finite]
            )

    @cached_property
    def _normal_model_steps(self) -> Array:
        """Where the saved model's states, from zeros, have been `normal_so_far`, `[rows, steps]`."""
        zeros = [np.zeros((len(self.model_x), *state.shape), state.dtype) for state in self.network.states]
        return normal_so_far(self.keras.history(unpack(self.model_x), zeros))

    @cached_property
    def _double_models(self) -> list[list[Array]]:
        """The saved model in float64, exact and rounded at random; none if it cannot be run in float64."""
        model, inputs = self.network.original, unpack(self.model_x)
        return run_saved_model_in_double(model, inputs)

    def _stepwise_limit(self, tensor: Tensor, ours: Array, true: Array) -> Array:
        """The limit at each time step, `[steps]`: four times float32 Keras's largest error so far, if it is needed."""
        if not self.allow_float32_error or not exceeds(ours, true):
            return np.full(STEPS, TOLERANCE)
        error = self._stepwise_errors[tensor]
        self.keras_float32_error = max(self.keras_float32_error, float(error.max()))
        return limit_of(error)

    @cached_property
    def _stepwise_errors(self) -> dict[Tensor, Array]:
        """Float32 Keras's largest error so far at each time step, `[steps]`, stepping and in one run."""
        found: dict[Tensor, Array] = {}
        if self._double is None:
            return dict.fromkeys(tensors_of(self.network), np.zeros(STEPS))
        exact, *others = self._double.histories(unpack(self.x), self.initial)
        for tensor in tensors_of(self.network):
            true = true_steps(exact, tensor)
            runs = [true_steps(each, tensor) for each in (self.history, *others)]
            if tensor.kind == "output":
                runs.append(np.where(_like(self.valid, true), self.y[tensor.index], true))
            error = own_error_of(runs[0], true, runs[1:]).reshape(ROWS, STEPS, -1)
            found[tensor] = np.maximum.accumulate(np.where(self.good, error.max(axis=2), 0).max(axis=0))
        return found

    def _difference(self, run: str, tensor: Tensor, ours: Array, true: Array, steps: Array, limit: Array) -> Difference:
        """Measures `ours` against Keras's `[n, ...]` at the time steps `steps [n]`, with the limits `limit [n]`."""
        error = relative_error(ours, true).reshape(len(true), -1).max(axis=1)
        worst = int(np.argmax(error / limit))
        name, layer = name_and_layer(self.network, tensor)
        share, where = float(error[worst] / limit[worst]), f"time step {steps[worst]}"
        return Difference(name, layer, run, float(error.max()), share, where)


def _like(mask: Array, array: Array) -> Array:
    """The mask with trailing axes of one, so that it broadcasts over an array."""
    return mask.reshape(*mask.shape, *(1 for _ in array.shape[mask.ndim :]))


def _largest_so_far(errors: Array, steps: Array) -> Array:
    """For errors `[n]` at time steps `[n]`, the largest at that step or before, over all rows."""
    by_step = np.zeros(int(steps.max()) + 1)
    np.maximum.at(by_step, steps, errors)
    return np.asarray(np.maximum.accumulate(by_step)[steps])
