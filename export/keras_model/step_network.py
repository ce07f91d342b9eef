"""Makes a Keras network's state explicit: one step as a function of inputs and states, and Keras's own run to compare.

The network is walked along Keras's own graph. Each recurrent layer (`keras.layers.RNN` over a cell, or over stacked
cells) is replaced: in `step` by one call of its cell, in `run` by Keras's loop over the same cell from given states.
All other layers are called unchanged, with a time axis of one where they have a time axis. Masks travel as in Keras.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import keras
import numpy as np
from keras import ops, tree

from cellserve.export.errors import ExportError, Unsteppable, first_line
from cellserve.export.keras_model.graph_walk import Call, is_timed, walk
from cellserve.export.keras_model.keras_private import all_layers, set_mask, takes_mask
from cellserve.export.keras_model.load import with_open_shapes
from cellserve.export.keras_model.naming import UniqueNames
from cellserve.export.keras_model.recurrences import Recurrence, RecurrentState, cells_of, recurrences_of
from cellserve.export.keras_model.tensor_specs import input_specs, output_specs
from cellserve.models.signature import Signature, StateSpec, TensorSpec

_PROBE_ROWS, _PROBE_STEPS = 2, 3


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Results of one step: outputs `[batch, *shape]`, next states, and the inputs of the excluded cells."""

    outputs: list[Any]
    states: list[Any]
    to_excluded: list[list[Any]]  # for each excluded cell its input, and its mask if it is masked


class StatefulNetwork:
    """A Keras network of recurrent layers with explicit states.

    Args:
        model: A Sequential or functional Keras model; every input is `[batch, time, *features]`.

    Raises:
        Unsteppable: The network works on whole sequences only; the message names the layer and the reason.
        ExportError: The network cannot be exported.
    """

    def __init__(self, model: Any) -> None:
        self.original = model
        self.model = with_open_shapes(model)
        self.inputs: tuple[TensorSpec, ...] = input_specs(self.model)
        self.recurrences: list[Recurrence] = []
        self.timed = [is_timed(tensor) for tensor in self.model.outputs]  # which outputs Keras returns for every step
        self.outputs: tuple[TensorSpec, ...] = self._discover()

    @property
    def states(self) -> list[RecurrentState]:
        """All states, in the order in which `step` and `run` take and return them."""
        return [state for recurrence in self.recurrences for state in recurrence.states]

    @property
    def signature(self) -> Signature:
        """The exported model's signature; a network that returns only its last output defaults to the last."""
        specs = (*self.inputs, *self.outputs)
        return Signature(
            inputs=self.inputs,
            outputs=self.outputs,
            lengths="lengths_of_rows" if any(spec.name == "lengths" for spec in specs) else "lengths",
            states=tuple(
                StateSpec(name=state.name, next_name=f"{state.name}.next", dtype=state.dtype, shape=state.shape)
                for state in self.states
            ),
            default_output="all" if any(self.timed) else "last",
        )

    def step(
        self, inputs: Sequence[Any], states: Sequence[Any], exclude: Callable[[Any], bool] = lambda cell: False
    ) -> StepOutput:
        """Advances by one time step.

        Args:
            inputs: Each `[batch, *features]`.
            states: One tensor per state, `[batch, *shape]`; for an excluded cell, its output instead of its states.
            exclude: Whether to exclude a cell: its input is then returned instead of its next states.
        """
        given, following, to_excluded = list(states), [], []
        places = iter(self.recurrences)

        def visit(call: Call) -> Any:
            layer, mask = call.operation, call.mask
            if not isinstance(layer, keras.layers.RNN):
                return _one_step(call)
            y = ops.squeeze(call.args[0], axis=1)
            mask = None if mask is None else ops.squeeze(mask, axis=1)
            for _ in cells_of(layer):
                recurrence = next(places)
                if exclude(recurrence.cell):
                    to_excluded.append([y] if mask is None else [y, mask])
                    y = given.pop(0)
                else:
                    y, new = recurrence.call(y, [given.pop(0) for _ in recurrence.states], mask)
                    following.extend(new)
            return _with_call_mask(call, ops.expand_dims(y, 1)) if layer.return_sequences else y

        outputs = walk(self.model, [ops.expand_dims(x, 1) for x in inputs], visit)
        outputs = [ops.squeeze(y, axis=1) if timed else y for y, timed in zip(outputs, self.timed, strict=True)]
        return StepOutput(outputs, following, to_excluded)

    def run(self, inputs: Sequence[Any], states: Sequence[Any], mask: Any = None) -> tuple[list[Any], list[Any]]:
        """Runs Keras's own loop over whole sequences: the reference for an export.

        Args:
            inputs: Each `[batch, time, *features]`.
            states: One tensor per state, `[batch, *shape]`.
            mask: `[batch, time]` bool, false where a row is padded.

        Returns:
            The outputs at every time step `[batch, time, *shape]` (layers after a recurrence that returns only its last
            output are applied to each of its outputs), and the states after each row's last step that is not padded.
        """
        batch, time = ops.shape(inputs[0])[0], ops.shape(inputs[0])[1]
        given, following = list(states), []
        places = iter(self.recurrences)

        def visit(call: Call) -> Any:
            layer, y = call.operation, call.args[0]
            if not isinstance(layer, keras.layers.RNN):
                return call()
            masks = [each for each in (mask, call.mask) if each is not None]
            both = ops.logical_and(*masks) if len(masks) == 2 else masks[0] if masks else None
            for _ in cells_of(layer):
                recurrence = next(places)
                y, new = recurrence.run(y, [given.pop(0) for _ in recurrence.states], both)
                following.extend(new)
            return _with_call_mask(call, y) if layer.return_sequences else ops.reshape(y, (-1, *y.shape[2:]))

        outputs = walk(self.model, inputs, visit)
        outputs = [
            y if timed else ops.reshape(y, (batch, time, *y.shape[1:]))
            for y, timed in zip(outputs, self.timed, strict=True)
        ]
        return outputs, following

    def _discover(self) -> tuple[TensorSpec, ...]:
        """Finds the recurrences and refuses layers that cannot be stepped; returns the output specs.

        A few time steps of random numbers go through the network, so that each layer is tried on what it gets there.
        """
        names = UniqueNames(layer for layer in all_layers(self.model) if isinstance(layer, keras.layers.RNN))

        def visit(call: Call) -> Any:
            layer, mask = call.operation, call.mask
            if not isinstance(layer, keras.layers.RNN):
                return _try_layer(call)
            _refuse_unsteppable(call)
            y = call.args[0]
            first_mask = None if mask is None else mask[:, 0]
            for recurrence, _ in recurrences_of(layer, names.assign(layer), y[:, 0], first_mask):
                self.recurrences.append(recurrence)
                zeros = [ops.zeros((_PROBE_ROWS, *state.shape), state.dtype) for state in recurrence.states]
                y, _ = recurrence.run(y, zeros, mask)
            return _with_call_mask(call, y) if layer.return_sequences else y[:, -1]

        rng = np.random.default_rng(0)
        outputs = walk(self.model, [_probe(spec, rng) for spec in self.inputs], visit)
        if not self.recurrences:
            raise ExportError(
                "the network has no recurrent layer (keras.layers.RNN over a cell): there is no state to serve"
            )
        return output_specs(
            self.model, [y[:, 0] if timed else y for y, timed in zip(outputs, self.timed, strict=True)], self.inputs
        )


def _probe(spec: TensorSpec, rng: np.random.Generator) -> Any:
    shape = (_PROBE_ROWS, _PROBE_STEPS, *spec.shape)
    if spec.dtype == "float32":
        return ops.convert_to_tensor(rng.normal(size=shape), dtype=keras.config.floatx())
    low, high = spec.bounds or (0, 1)
    return ops.convert_to_tensor(rng.integers(low, high, shape, endpoint=True), dtype=spec.dtype)


def _with_call_mask(call: Call, y: Any) -> Any:
    """Attaches the call's mask, or none, to a recurrent layer's output; returns the output."""
    set_mask(y, call.mask)
    return y


def _one_step(call: Call) -> Any:
    """Calls a layer that is not recurrent on a time axis of one.

    `Dense` is called without that axis: for three axes Keras uses a tensordot, which converts to many shape operators.
    """
    layer = call.operation
    inner = layer.layer if type(layer) is keras.layers.TimeDistributed else layer
    plain = type(layer) is keras.layers.Dense or (inner is not layer and not takes_mask(inner))
    if not plain or not call.takes_time:
        return call()
    return call.with_mask(ops.expand_dims(inner(ops.squeeze(call.args[0], axis=1)), 1))


def _try_layer(call: Call) -> Any:
    """Calls a layer on several time steps at once; refuses it if its results differ from those one by one."""
    if isinstance(call.operation, keras.layers.Bidirectional):
        raise Unsteppable(f"{call} also reads the sequence backwards")
    arguments: Any = call.args, call.kwargs
    times = tree.map_structure(is_timed, call.symbolic)
    try:
        result = call()
    except Exception as error:  # from TensorFlow or the layer itself: a convolution that needs more steps, say
        raise Unsteppable(
            f"{call} mixes time steps: it does not work on {_PROBE_STEPS} of them ({first_line(error)})"
        ) from None
    if not any(tree.flatten(times)):
        return result
    whole = [np.asarray(value) for value in tree.flatten(result)]
    for t in range(_PROBE_STEPS):
        one = tree.map_structure(lambda v, timed, t=t: v[:, t : t + 1] if timed else v, arguments, times)
        try:
            alone = _arrays(call.operation, one)
        except Exception as error:  # from TensorFlow, NumPy or the layer itself
            raise Unsteppable(f"{call} does not work on a single time step ({first_line(error)})") from None
        for y, single in zip(whole, alone, strict=True):
            part = y[:, t : t + 1]
            if y.shape[1:2] != (_PROBE_STEPS,) or single.shape != part.shape:
                _mixes(call)
            # What is not finite, the logarithm of a negative number say, is compared as such.
            if not np.allclose(single, part, 1e-4, 1e-4, equal_nan=True):
                _mixes(call)
    return result


def _arrays(operation: Any, arguments: Any) -> list[Any]:
    args, kwargs = arguments
    return [np.asarray(value) for value in tree.flatten(operation(*args, **kwargs))]


def _mixes(call: Call) -> NoReturn:
    raise Unsteppable(f"{call} mixes time steps; only layers that treat each time step alone can be stepped")


def _refuse_unsteppable(call: Call) -> None:
    layer, sequence = call.operation, call.args[0]
    if layer.go_backwards:
        raise Unsteppable(f"{call} reads the sequence backwards (go_backwards)")
    if not call.takes_time or sequence.ndim < 3:
        raise Unsteppable(f"{call} does not run over the input's time axis")
    refuse_foreign_states(call)


def refuse_foreign_states(call: Call) -> None:
    """Refuses a recurrent layer that takes more than a sequence or returns more than its outputs."""
    args, kwargs = call.symbolic
    others = tree.flatten((args[1:], {key: value for key, value in kwargs.items() if key != "mask"}))
    others += tree.flatten(args[0])[1:]
    if call.operation.return_state:
        raise ExportError(
            f"{call} returns its states as outputs (return_state): leave it out, sessions offer their states"
        )
    if any(isinstance(value, keras.KerasTensor) for value in others):
        raise ExportError(
            f"{call} takes more than a sequence (initial_state or constants): leave it out, and send states with a "
            f"request and constants with every step"
        )
