"""Compares a converted model with Keras: over long runs, in chunks, with padding, and step by step.

The tolerance is `|ours - Keras| <= 1e-5 * max(1, |Keras|)`. If float32 Keras itself differs by more than that from a
float64 run (the network amplifies rounding), the limit is four times Keras's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from cellserve.export.keras_model import keras_private
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.sequence_network import SequenceNetwork
from cellserve.export.verify.keras_runs import (
    History,
    KerasSteps,
    double,
    double_of,
    run_network,
    run_saved_model,
    run_saved_model_in_double,
)
from cellserve.export.verify.special_values import LARGE, draw_special, nudged
from cellserve.service.runtime.batch_invariance import Array, random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import TensorLayout, unpack

TOLERANCE = 1e-5
KERAS_FLOAT32_ERROR_FACTOR = 4.0  # allowed error, as a multiple of float32 Keras's own
# How much results change with rounding is found by runs in float64 of slightly different numbers. A sum of large ones
# that cancel out is all rounding; ordinary ones are changed by half a unit in the last place.
LARGE_NUDGES, LARGE_NUDGE = 16, 2.0**-20
NUDGES, NUDGE = 3, 2.0**-24
OTHER_BRANCH = 1e-2  # an own error of Keras above this is no rounding: it took another branch than in float64
ROWS, STEPS = 16, 208
EXTRA_STEPS = (0, 1, 2, 13, 119)  # test lengths of a network of whole sequences: its shortest plus each of these


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
    unjudged: int  # single steps on special numbers on which float32 Keras itself takes another branch than in float64

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
        return {**figures, "keras_float32_error": self.keras_float32_error, "special_unjudged": self.unjudged}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One compared tensor of a network."""

    kind: Literal["state", "output"]
    index: int  # its place among the network's states, or among its outputs


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
        self.good = _finite_so_far(self.history)
        self.valid = (np.arange(STEPS) < self.lengths[:, None]) & self.good
        padded = np.arange(STEPS) < self.lengths[:, None]
        self.y, self.final = run_network(network, unpack(self.x), self.initial, padded)
        self.model_x, self.model_y = self._keras_model()
        self.special = SpecialReference(network, self.keras, lambda: self._double, rng)
        self.keras_float32_error = 0.0
        self.allow_float32_error = True

    def compare(self, runtime: Runtime, allow_float32_error: bool = True) -> Parity:
        """Runs a model whole, in chunks and in single steps from Keras's states, and measures every tensor.

        Args:
            runtime: The model.
            allow_float32_error: Whether float32 Keras's own error may raise the limit. Pass False for lower precision,
                to which no limit applies and which is not compared on special numbers.
        """
        self.keras_float32_error, self.allow_float32_error = 0.0, allow_float32_error
        y, final = runtime.run(self.x, self.lengths, self.initial)
        by_step = self._by_step(y)
        whole = list(self._differences("whole", y, final))
        y, final = self._in_chunks(runtime)
        chunks = list(self._differences("chunks", y, final))
        steps = list(self._step_differences(runtime))
        model = list(self._model_differences(runtime))
        special = list(self.special.differences(runtime)) if allow_float32_error else []
        differences = (*steps, *whole, *chunks, *model, *special)
        return Parity(differences, self.keras_float32_error, ROWS, STEPS, by_step, self.special.unjudged)

    @cached_property
    def _double(self) -> KerasSteps | None:
        return double_of(self.network)

    def _by_step(self, y: Array) -> tuple[tuple[int, float], ...]:
        worst = np.zeros(STEPS)
        for ours, true in zip(unpack(y), self.y, strict=True):
            error = _relative_error(ours, true).reshape(*self.valid.shape, -1).max(axis=2)
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
        single = SingleSteps(self.x, self.history, self.good)
        y, after = runtime.run(single.x, single.lengths, single.before)
        for tensor, ours, true in single.compared(y, after):
            error = self._single_step_error(tensor) if _exceeds(ours, true) else 0.0
            limit = _limit(np.full(len(true), error))
            yield self._difference("steps", tensor, ours, true, single.steps, limit)

    @cached_property
    def _double_single_steps(self) -> tuple[list[Array], list[Array]] | None:
        single = SingleSteps(self.x, self.history, self.good)
        return None if self._double is None else self._double.step(unpack(single.x), single.before)

    def _single_step_error(self, tensor: Tensor) -> float:
        """Float32 Keras's largest error in a single step, against the same step in float64."""
        if self._double_single_steps is None or not self.allow_float32_error:
            return 0.0
        outputs, following = self._double_single_steps
        single = SingleSteps(self.x, self.history, self.good)
        exact = outputs[tensor.index][:, 0] if tensor.kind == "output" else following[tensor.index]
        error = float(_relative_error(single.true(tensor), exact).max(initial=0))
        self.keras_float32_error = max(self.keras_float32_error, error)
        return error

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
            runs = self._double_models if self.allow_float32_error and _exceeds(ours[finite], true[finite]) else []
            if runs:
                exact, *near = (run[index].reshape(shape) for run in runs)
                errors = np.maximum.reduce([_relative_error(each, exact) for each in (true, *near)])
                errors = _largest_so_far(errors.reshape(len(true), -1).max(axis=1), steps)
                self.keras_float32_error = max(self.keras_float32_error, float(errors.max()))
                limit = _limit(errors)
            yield self._difference(
                "model", Tensor("output", index), ours[finite], true[finite], steps[finite], limit[finite]
            )

    @cached_property
    def _double_models(self) -> list[list[Array]]:
        """The saved model in float64, on its inputs and on slightly different ones; empty if it cannot be run so."""
        inputs, rng = unpack(self.model_x), np.random.default_rng(0)
        near = [nudged(list(map(double, inputs)), rng, NUDGE) for _ in range(NUDGES)]
        runs = [run_saved_model_in_double(self.network.original, each) for each in (inputs, *near)]
        return [run for run in runs if run is not None]

    def _stepwise_limit(self, tensor: Tensor, ours: Array, true: Array) -> Array:
        """The limit at each time step, `[steps]`: four times float32 Keras's largest error so far, if it is needed."""
        if not self.allow_float32_error or not _exceeds(ours, true):
            return np.full(STEPS, TOLERANCE)
        error = self._stepwise_errors[tensor]
        self.keras_float32_error = max(self.keras_float32_error, float(error.max()))
        return _limit(error)

    @cached_property
    def _stepwise_errors(self) -> dict[Tensor, Array]:
        """Float32 Keras's largest error so far at each time step, `[steps]`, stepping and in one run."""
        found: dict[Tensor, Array] = {}
        if self._double is None:
            return dict.fromkeys(tensors_of(self.network), np.zeros(STEPS))
        inputs, initial, rng = unpack(self.x), self.initial, np.random.default_rng(0)
        doubles = list(map(double, inputs)), list(map(double, initial))
        near = [[nudged(each, rng, NUDGE) for each in doubles] for _ in range(NUDGES)]
        exact, *others = (self._double.history(*each) for each in ((inputs, initial), *near))
        for tensor in tensors_of(self.network):
            true = true_steps(exact, tensor)
            runs = [true_steps(each, tensor) for each in (self.history, *others)]
            if tensor.kind == "output":
                runs.append(np.where(_like(self.valid, true), self.y[tensor.index], true))
            error = np.maximum.reduce([_relative_error(each, true) for each in runs]).reshape(ROWS, STEPS, -1)
            found[tensor] = np.maximum.accumulate(np.where(self.good, error.max(axis=2), 0).max(axis=0))
        return found

    def _difference(self, run: str, tensor: Tensor, ours: Array, true: Array, steps: Array, limit: Array) -> Difference:
        """Measures `ours` against Keras's `[n, ...]` at the time steps `steps [n]`, with the limits `limit [n]`."""
        error = _relative_error(ours, true).reshape(len(true), -1).max(axis=1)
        worst = int(np.argmax(error / limit))
        name, layer = name_and_layer(self.network, tensor)
        share, where = float(error[worst] / limit[worst]), f"time step {steps[worst]}"
        return Difference(name, layer, run, float(error.max()), share, where)


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
        self.good = _finite_so_far(self.history)
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
        finite = np.logical_and.reduce([_finite_rows(each) for each in (*after, *unpack(y))])
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
        finite = np.logical_and.reduce([_finite_rows(each) for each in (*final, *unpack(y))])
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
        error = _relative_error(ours, true).reshape(len(true), -1).max(axis=1)
        error = np.where(judged, np.where(good, error, np.where(finite, np.inf, 0.0)), 0.0)
        limit = np.full(len(error), TOLERANCE)
        if (error > TOLERANCE).any():
            own_error = own()[tensor]
            other_branch = (own_error > OTHER_BRANCH) & (error > TOLERANCE)
            self.unjudged += int(other_branch.sum())
            error, limit = np.where(other_branch, 0.0, error), _limit(own_error)
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
    error = np.maximum.reduce([_relative_error(each, exact) for each in (single, *large)])
    rounding = np.maximum.reduce([_relative_error(each, exact) for each in near])
    return np.maximum(error, np.where(rounding > OTHER_BRANCH, 0.0, rounding))


def _like(mask: Array, array: Array) -> Array:
    """The mask with trailing axes of one, so that it broadcasts over an array."""
    return mask.reshape(*mask.shape, *(1 for _ in array.shape[mask.ndim :]))


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


def _relative_error(ours: Array, true: Array) -> Array:
    """`|ours - true| / max(1, |true|)`; infinite where only one of the two is finite, 0 where neither is."""
    ours, true = ours.astype(np.float64), true.astype(np.float64)
    finite = np.isfinite(ours), np.isfinite(true)
    with np.errstate(all="ignore"):
        error = np.abs(ours - true) / np.maximum(1, np.abs(true))
    return np.where(finite[0] & finite[1], error, np.where(finite[0] | finite[1], np.inf, 0.0))


def _exceeds(ours: Array, true: Array) -> bool:
    return bool((_relative_error(ours, true) > TOLERANCE).any())


def _limit(error: Array) -> Array:
    return np.asarray(np.maximum(TOLERANCE, KERAS_FLOAT32_ERROR_FACTOR * error))


def _largest_so_far(errors: Array, steps: Array) -> Array:
    """For errors `[n]` at time steps `[n]`, the largest at that step or before, over all rows."""
    by_step = np.zeros(int(steps.max()) + 1)
    np.maximum.at(by_step, steps, errors)
    return np.asarray(np.maximum.accumulate(by_step)[steps])


def _finite_rows(array: Array) -> Array:
    return np.asarray(np.isfinite(array).reshape(len(array), -1).all(axis=1))


def _finite_so_far(history: History) -> Array:
    """Where all outputs and states of a history are finite and have been in all steps before, `[rows, steps]`."""
    tensors = [*history[0], *(state[:, 1:] for state in history[1])]
    finite = [np.isfinite(each).reshape(*each.shape[:2], -1).all(axis=2) for each in tensors]
    return np.logical_and.accumulate(np.logical_and.reduce(finite), axis=1)


class SequenceReference:
    """Keras's results for sequences of several lengths, to compare a network that reads whole sequences with.

    Args:
        network: The Keras network.
        seed: Seed of the random numbers.
    """

    def __init__(self, network: SequenceNetwork, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.network = network
        self.cases: list[tuple[Array, list[Array]]] = []
        rows, time = network.original.inputs[0].shape[:2]
        for length in (time,) if time else (network.min_steps + extra for extra in EXTRA_STEPS):
            x, _ = random_inputs(network.signature, rows or 3, length, rng)
            self.cases.append((x, run_saved_model(network.original, unpack(x))))

    def compare(self, runtime: Runtime, allow_float32_error: bool = True) -> Parity:
        """Runs a model over the sequences of each length, and measures every output."""
        differences, float32_error = [], 0.0
        by_length: dict[int, float] = {}
        for x, true in self.cases:
            lengths = np.full(len(x), x.shape[1], np.int32)
            y, _ = runtime.run(x, lengths, [])
            for index, output in enumerate(unpack(y)):
                ours, keras_y = output.astype(np.float64), true[index].astype(np.float64)
                if not self.network.timed[index]:
                    ours = ours.reshape(keras_y.shape) if ours.size == keras_y.size else ours[:, -1]
                worst, allowed = float(_relative_error(ours, keras_y).max()), TOLERANCE
                by_length[x.shape[1]] = max(worst, by_length.get(x.shape[1], 0.0))
                if allow_float32_error and worst > TOLERANCE:
                    float32_error = max(float32_error, self._keras_float32_error(x, index, keras_y))
                    allowed = max(TOLERANCE, KERAS_FLOAT32_ERROR_FACTOR * float32_error)
                spec = self.network.outputs[index]
                layer = keras_private.producer(self.network.model.outputs[index]).name
                where = f"{x.shape[1]} time steps"
                differences.append(Difference(spec.name, layer, "model", worst, worst / allowed, where))
        rows, time = self.cases[-1][0].shape[:2]
        return Parity(tuple(differences), float32_error, rows, time, tuple(by_length.items()), 0)

    def _keras_float32_error(self, x: Array, index: int, single: Array) -> float:
        """Float32 Keras's own error of one output against a float64 run."""
        exact = run_saved_model_in_double(self.network.original, unpack(x))
        return 0.0 if exact is None else float(_relative_error(single, exact[index]).max())
