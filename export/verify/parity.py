"""Compares a converted model with Keras: over long runs, in chunks, with padding, and step by step.

The tolerance is `|ours - Keras| <= 1e-5 * max(1, |Keras|)`. If float32 Keras itself differs by more than that from a
float64 run (the network amplifies rounding), the limit is four times Keras's own error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from keras import tree

from cellserve.export.keras_model import keras_private
from cellserve.export.keras_model.load import with_dtype
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.sequence_network import SequenceNetwork
from cellserve.service.runtime.batch_invariance import Array, random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import TensorLayout, unpack

TOLERANCE = 1e-5
KERAS_FLOAT32_ERROR_FACTOR = 4.0  # allowed error, as a multiple of float32 Keras's own
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
        return {**figures, "keras_float32_error": self.keras_float32_error}


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
        self.outputs = TensorLayout(self.signature.outputs)
        self.x, self.initial = random_inputs(self.signature, ROWS, STEPS, rng)
        self.lengths = rng.integers(1, STEPS + 1, ROWS).astype(np.int32)
        self.lengths[0] = STEPS
        self.cuts = [0, *np.sort(rng.choice(np.arange(1, STEPS), 12, replace=False)), STEPS]
        self.valid = np.arange(STEPS) < self.lengths[:, None]
        self.y, self.final = self._keras(network, self.x, self.initial)
        self.step_y, self.step_states = self._keras_steps()
        self.model_x, self.model_y = self._keras_model()
        self._double: tuple[list[Array], list[Array]] | None = None
        self.keras_float32_error = 0.0
        self.allow_float32_error = True

    def compare(self, runtime: Runtime, allow_float32_error: bool = True) -> Parity:
        """Runs a model whole, in chunks and in single steps from Keras's states, and measures every tensor.

        Args:
            runtime: The model.
            allow_float32_error: Whether float32 Keras's own error may raise the limit. Pass False for lower precision,
                to which no limit applies.
        """
        self.keras_float32_error, self.allow_float32_error = 0.0, allow_float32_error
        y, final = runtime.run(self.x, self.lengths, self.initial)
        by_step = self._by_step(y)
        whole = list(self._differences("whole", y, final))
        y, final = self._in_chunks(runtime)
        chunks = list(self._differences("chunks", y, final))
        steps = list(self._step_differences(runtime))
        model = list(self._model_differences(runtime))
        return Parity((*steps, *whole, *chunks, *model), self.keras_float32_error, ROWS, STEPS, by_step)

    def _by_step(self, y: Array) -> tuple[tuple[int, float], ...]:
        worst = np.zeros(STEPS)
        for ours, true in zip(unpack(y), unpack(self.y), strict=True):
            wide = true.astype(np.float64)
            error = (np.abs(ours - wide) / np.maximum(1, np.abs(wide))).reshape(*self.valid.shape, -1).max(axis=2)
            worst = np.maximum(worst, np.where(self.valid, error, 0).max(axis=0))
        return tuple(enumerate(worst.tolist(), 1))

    def _keras(self, network: StatefulNetwork, x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        run = tf.function(network.run, autograph=False)
        outputs, final = run(_tensors(unpack(x)), _tensors(states), self.valid)
        return self.outputs.pack(list(map(np.asarray, outputs))), [np.asarray(state) for state in final]

    def _keras_steps(self) -> tuple[Array, list[Array]]:
        """Steps Keras from the initial states: outputs `[rows, steps, ...]`, states before each step and at the end."""
        outputs, history = _stepped(self.network, unpack(self.x), self.initial)
        return self.outputs.pack(outputs), history

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
        y = np.zeros_like(self.y)
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
        for index, state in enumerate(final):
            yield self._difference(run, Tensor("state", index), state, self.final[index], last_steps)
        steps = np.broadcast_to(np.arange(STEPS), self.valid.shape)
        yield from self._output_differences(run, y[self.valid], self.y[self.valid], steps[self.valid])

    def _step_differences(self, runtime: Runtime) -> Iterator[Difference]:
        """Compares single steps from Keras's states: errors do not add up, so the layer that is wrong shows itself."""
        before = [state[:, :-1].reshape(-1, *state.shape[2:]) for state in self.step_states]
        x = np.ascontiguousarray(self.x.reshape(-1, 1, *self.x.shape[2:]))
        y, after = runtime.run(x, np.ones(len(x), np.int32), before)
        steps = np.tile(np.arange(STEPS), ROWS)
        for index, state in enumerate(after):
            true = self.step_states[index][:, 1:].reshape(state.shape)
            yield self._difference("steps", Tensor("state", index), state, true, steps)
        yield from self._output_differences("steps", y, self.step_y.reshape(y.shape), steps)

    def _model_differences(self, runtime: Runtime) -> Iterator[Difference]:
        rows, time = self.model_x.shape[:2]
        y, _ = runtime.run(np.ascontiguousarray(self.model_x), np.full(rows, time, np.int32), runtime.zeros(rows))
        for index, (ours, true) in enumerate(zip(unpack(y), self.model_y, strict=True)):
            steps = np.tile(np.arange(time), rows)
            if not self.network.timed[index]:
                ours, steps = ours[:, -1], steps[time - 1 :: time]
            shape = (len(steps), *self.signature.outputs[index].shape)
            yield self._difference("model", Tensor("output", index), ours.reshape(shape), true.reshape(shape), steps)

    def _output_differences(self, run: str, ours: Array, true: Array, steps: Array) -> Iterator[Difference]:
        for index, (one, other) in enumerate(zip(unpack(ours), unpack(true), strict=True)):
            yield self._difference(run, Tensor("output", index), one, other, steps)

    def _difference(self, run: str, tensor: Tensor, ours: Array, true: Array, steps: Array) -> Difference:
        """Measures `ours` against Keras's `[n, ...]`; `steps [n]` is the time step of each row."""
        ours, true = ours.astype(np.float64), true.astype(np.float64)
        error = np.abs(ours - true) / np.maximum(1, np.abs(true))
        error = np.where(np.isfinite(ours), error, np.inf).reshape(len(error), -1).max(axis=1)
        allowed = np.full(len(error), TOLERANCE)
        if self.allow_float32_error and (error > TOLERANCE).any() and run != "steps":
            allowed = np.maximum(allowed, KERAS_FLOAT32_ERROR_FACTOR * self._keras_float32_error(tensor)[steps])
        worst = int(np.argmax(error / allowed))
        name, layer = self._name_and_layer(tensor)
        share, where = float(error[worst] / allowed[worst]), f"time step {steps[worst]}"
        return Difference(name, layer, run, float(error.max()), share, where)

    def _name_and_layer(self, tensor: Tensor) -> tuple[str, str]:
        if tensor.kind == "state":
            return [
                (state.name, recurrence.layer) for recurrence in self.network.recurrences for state in recurrence.states
            ][tensor.index]
        layer = keras_private.producer(self.network.model.outputs[tensor.index]).name
        return self.signature.outputs[tensor.index].name, layer

    def _keras_float32_error(self, tensor: Tensor) -> Array:
        """Float32 Keras's largest error so far at each time step, `[steps]`, against a float64 run."""
        if self._double is None:
            network = StatefulNetwork(with_dtype(self.network.model, "float64"))
            inputs = [_double(part) for part in unpack(self.x)]
            self._double = _stepped(network, inputs, [_double(state) for state in self.initial])
        outputs, states = self._double
        if tensor.kind == "output":
            exact, single = outputs[tensor.index], unpack(self.step_y)[tensor.index]
        else:
            exact, single = states[tensor.index][:, 1:], self.step_states[tensor.index][:, 1:]
        error = np.abs(single - exact) / np.maximum(1, np.abs(exact))
        by_step = error.max(axis=(0, *range(2, error.ndim)))
        self.keras_float32_error = max(self.keras_float32_error, float(by_step.max()))
        return np.asarray(np.maximum.accumulate(by_step))


def _stepped(
    network: StatefulNetwork, inputs: Sequence[Array], initial: Sequence[Array]
) -> tuple[list[Array], list[Array]]:
    """Steps Keras: each output `[rows, steps, ...]`, each state before every step and at the end."""
    run = tf.function(network.run, autograph=False)
    states, ys, history = _tensors(initial), [], [list(initial)]
    for t in range(inputs[0].shape[1]):
        y, states = run(_tensors([x[:, t : t + 1] for x in inputs]), states)
        ys.append(list(map(np.asarray, y)))
        history.append(list(map(np.asarray, states)))
    outputs = [np.concatenate(tensors, axis=1) for tensors in zip(*ys, strict=True)]
    return outputs, [np.stack(tensors, axis=1) for tensors in zip(*history, strict=True)]


def run_saved_model(model: Any, inputs: Sequence[Array]) -> list[Array]:
    """Runs a Keras model unchanged over whole sequences `[batch, time, *features]`; returns its outputs."""
    for layer in keras_private.all_layers(model):
        if getattr(layer, "stateful", False):
            layer.reset_state()
    cast = [np.ascontiguousarray(x).astype(t.dtype) for x, t in zip(inputs, model.inputs, strict=True)]
    structure = tree.pack_sequence_as(keras_private.input_structure(model), [tf.constant(x) for x in cast])
    return [np.asarray(y) for y in tree.flatten(tf.function(model, autograph=False)(structure))]


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
                error = np.abs(ours - keras_y) / np.maximum(1, np.abs(keras_y))
                worst, allowed = float(np.where(np.isfinite(error), error, np.inf).max()), TOLERANCE
                by_length[x.shape[1]] = max(worst, by_length.get(x.shape[1], 0.0))
                if allow_float32_error and worst > TOLERANCE:
                    float32_error = max(float32_error, self._keras_float32_error(x, index, keras_y))
                    allowed = max(TOLERANCE, KERAS_FLOAT32_ERROR_FACTOR * float32_error)
                spec = self.network.outputs[index]
                layer = keras_private.producer(self.network.model.outputs[index]).name
                where = f"{x.shape[1]} time steps"
                differences.append(Difference(spec.name, layer, "model", worst, worst / allowed, where))
        rows, time = self.cases[-1][0].shape[:2]
        return Parity(tuple(differences), float32_error, rows, time, tuple(by_length.items()))

    def _keras_float32_error(self, x: Array, index: int, single: Array) -> float:
        """Float32 Keras's own error of one output against a float64 run."""
        double = with_dtype(self.network.original, "float64")
        exact = run_saved_model(double, [_double(part) for part in unpack(x)])[index]
        return float((np.abs(single - exact) / np.maximum(1, np.abs(exact))).max())


def _tensors(arrays: Sequence[Array]) -> list[Any]:
    return [tf.constant(np.ascontiguousarray(array)) for array in arrays]


def _double(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype == np.float32 else array
