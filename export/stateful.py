"""Makes a Keras network's state explicit: one step as a function of input and states, and Keras's own run to compare.

The network is walked along Keras's own graph. Each recurrent layer (`keras.layers.RNN` over a cell, or over stacked
cells) is replaced: in `step` by one call of its cell, in `run` by Keras's loop over the same cell from given states.
All other layers are called as they are, with a time axis of one where they had a time axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from export.errors import ExportError
from models.signature import TensorSpec

Handler = Callable[[Any, Any], Any]  # (recurrent layer, its input sequence) -> its output


@dataclass(frozen=True, slots=True)
class State:
    """One tensor that a recurrence carries from step to step."""

    name: str  # layer.state, such as lstm.h
    shape: tuple[int, ...]  # without the batch axis
    dtype: str


@dataclass(frozen=True, slots=True)
class Recurrence:
    """One cell where it stands in the network, and what it carries."""

    layer: str
    cell: Any
    states: tuple[State, ...]
    output_shape: tuple[int, ...]  # of one step, without the batch axis
    nesting: Any  # the states as the cell takes them, lists within lists

    def call(self, x: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        """Calls the cell on `x [batch, *features]`; gives its output and its next states as a flat list."""
        y, new = self.cell(x, tree.pack_sequence_as(self.nesting, states))
        return y, tree.flatten(new)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step gives: the output `[batch, *outputs]`, next states, and the inputs of the cells left out."""

    y: Any
    states: list[Any]
    into_left_out: list[Any]


class StatefulNetwork:
    """A Keras network of recurrent layers with its states laid open.

    Args:
        model: A Sequential or functional Keras model with one input `[batch, time, *features]` and one output.

    Raises:
        ExportError: Something in the model cannot be stepped; the message names the layer and the reason.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, keras.Model) or not hasattr(_graph(model), "_run_through_graph"):
            raise ExportError(
                "only Sequential and functional models can be exported, a subclassed model hides its layers: "
                "build it as keras.Sequential([...]) or keras.Model(inputs, outputs)"
            )
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise ExportError(
                f"the network has {len(model.inputs)} inputs and {len(model.outputs)} outputs, one of each is taken"
            )
        shape = tuple(model.inputs[0].shape)
        if len(shape) < 2 or shape[1] is not None or None in shape[2:]:
            raise ExportError(
                f"the input has shape {shape}, not [batch, time, *features] with the time left open: "
                f"declare it as keras.Input((None, features))"
            )
        self.model = model
        self.features: tuple[int, ...] = shape[2:]
        self.input = _input_spec(model, self.features)
        self.input_dtype: str = self.input.dtype
        self.recurrences: list[Recurrence] = []
        self.outputs: tuple[int, ...] = self._discover()

    @property
    def states(self) -> list[State]:
        """All states, in the order in which `step` and `run` take and give them."""
        return [state for recurrence in self.recurrences for state in recurrence.states]

    @property
    def gives_last_only(self) -> bool:
        """Whether the Keras network gives its last output only (its last recurrence has no `return_sequences`)."""
        return not self._output_is_timed

    def step(self, x: Any, states: Sequence[Any], leave_out: Callable[[Any], bool] = lambda cell: False) -> Step:
        """Advances by one time step.

        Args:
            x: `[batch, *features]`.
            states: One tensor a state, `[batch, *shape]`; for a cell left out, its output stands in their place.
            leave_out: Says of a cell whether to leave it out: its input is then given instead of its next states.
        """
        given, following, into_left_out = list(states), [], []
        places = iter(self.recurrences)

        def recurrent(layer: Any, sequence: Any) -> Any:
            y = ops.squeeze(sequence, axis=1)
            for _ in _cells(layer):
                recurrence = next(places)
                if leave_out(recurrence.cell):
                    into_left_out.append(y)
                    y = given.pop(0)
                else:
                    y, new = recurrence.call(y, [given.pop(0) for _ in recurrence.states])
                    following.extend(new)
            return ops.expand_dims(y, 1) if layer.return_sequences else y

        y = _walk(self.model, [ops.expand_dims(x, 1)], recurrent, _one_step)
        return Step(ops.squeeze(y, axis=1) if self._output_is_timed else y, following, into_left_out)

    def run(self, x: Any, states: Sequence[Any], mask: Any = None) -> tuple[Any, list[Any]]:
        """Runs Keras's own loop over whole sequences: what an export is compared with.

        Args:
            x: `[batch, time, *features]`.
            states: One tensor a state, `[batch, *shape]`.
            mask: `[batch, time]` bool, false where a row is padded.

        Returns:
            The output at every time step `[batch, time, *outputs]` (layers behind a recurrence that gives only its last
            output are applied to each of its outputs), and the states after each row's last step that is not masked.
        """
        batch, time = ops.shape(x)[0], ops.shape(x)[1]
        given, following = list(states), []
        places = iter(self.recurrences)

        def recurrent(layer: Any, sequence: Any) -> Any:
            y = sequence
            for _ in _cells(layer):
                recurrence = next(places)
                initial = tree.pack_sequence_as(recurrence.nesting, [given.pop(0) for _ in recurrence.states])
                loop = keras.layers.RNN(recurrence.cell, return_sequences=True, return_state=True)
                y, *new = loop(y, initial_state=initial, mask=mask)
                following.extend(tree.flatten(new))
            return y if layer.return_sequences else ops.reshape(y, (-1, *y.shape[2:]))

        y = _walk(self.model, [x], recurrent, lambda layer: layer)
        return y if self._output_is_timed else ops.reshape(y, (batch, time, *y.shape[1:])), following

    def _discover(self) -> tuple[int, ...]:
        """Finds the recurrences and refuses what cannot be stepped; gives the shape of one step's output."""
        names: dict[str, int] = {}
        self._output_is_timed = True

        def recurrent(layer: Any, sequence: Any) -> Any:
            _refuse_unsteppable(layer, sequence)
            count = names[layer.name] = names.get(layer.name, 0) + 1
            name = layer.name if count == 1 else f"{layer.name}_{count}"
            y = ops.squeeze(sequence, axis=1)
            cells = _cells(layer)
            for place, cell in enumerate(cells):
                initial = _initial_states(cell, name)
                flat = tree.flatten(initial)
                prefix = name if len(cells) == 1 else f"{name}.{place}"
                states = tuple(
                    State(f"{prefix}.{label}", tuple(state.shape[1:]), keras.backend.standardize_dtype(state.dtype))
                    for label, state in zip(_state_names(cell, len(flat)), flat, strict=True)
                )
                y, _ = cell(y, initial)
                nesting = tree.map_structure(lambda _: 0, initial)
                self.recurrences.append(Recurrence(name, cell, states, tuple(y.shape[1:]), nesting))
            self._output_is_timed = layer.return_sequences
            return ops.expand_dims(y, 1) if layer.return_sequences else y

        for layer in self.model._flatten_layers():
            _refuse_masking(layer)
        x = ops.zeros((2, 1, *self.features), self.input_dtype)
        y = _walk(self.model, [x], recurrent, _probed)
        if not self.recurrences:
            raise ExportError("the network has no recurrent layer (keras.layers.RNN over a cell): it carries no state")
        return tuple(y.shape[2:] if self._output_is_timed else y.shape[1:])


def _input_spec(model: Any, features: tuple[int, ...]) -> TensorSpec:
    """Gives the input; one that only an `Embedding` reads holds integers, whatever the model says of it."""
    readers = [
        node.operation
        for nodes in _graph(model)._nodes_by_depth.values()
        for node in nodes
        if any(tensor is _graph(model).inputs[0] for tensor in node.input_tensors)
    ]
    if readers and all(isinstance(layer, keras.layers.Embedding) for layer in readers):
        bounds = 0, min(layer.input_dim for layer in readers) - 1
        return TensorSpec(name="x", dtype="int32", shape=features, bounds=bounds)
    return TensorSpec(name="x", shape=features)


def with_dtype(model: Any, dtype: str) -> Any:
    """Makes a copy of a Keras model that stores and computes in `dtype`, with the same weights."""

    def changed(config: Any) -> Any:
        if isinstance(config, dict):
            if config.get("class_name") == "DTypePolicy":
                return {**config, "config": {**config["config"], "name": dtype}}
            return {
                key: dtype if key == "dtype" and _is_float(value) else changed(value) for key, value in config.items()
            }
        return [changed(value) for value in config] if isinstance(config, list | tuple) else config

    copy = type(model).from_config(changed(model.get_config()))
    copy.set_weights(model.get_weights())
    return copy


def _is_float(dtype: Any) -> bool:
    return isinstance(dtype, str) and "float" in dtype


def _graph(model: Any) -> Any:
    return getattr(model, "_functional", None) or model


def _walk(model: Any, inputs: list[Any], recurrent: Handler, ordinary: Callable[[Any], Any]) -> Any:
    """Runs a model's graph with its recurrent layers, and the layers of models within it, replaced."""

    def replaced(layer: Any) -> Any:
        if isinstance(layer, keras.layers.RNN):
            return lambda sequence, **_: recurrent(layer, sequence)
        if isinstance(layer, keras.Model):
            return lambda *args, **_: _walk(layer, tree.flatten(args), recurrent, ordinary)
        return ordinary(layer)

    # Keras's public clone_model(call_function=...) cannot change a tensor's rank on the way, which a step does.
    return _graph(model)._run_through_graph(inputs, operation_fn=replaced)


def _one_step(layer: Any) -> Any:
    """Gives the layer as it acts on a time axis of one.

    `Dense` is called without that axis: on three axes Keras makes it a tensordot, which converts to a tangle of shapes.
    """
    inner = layer.layer if isinstance(layer, keras.layers.TimeDistributed) else layer
    if inner is layer and (type(layer) is not keras.layers.Dense or not _takes_time(layer)):
        return layer
    return lambda sequence, **_: ops.expand_dims(inner(ops.squeeze(sequence, axis=1)), 1)


def _probed(layer: Any) -> Any:
    """Gives the layer, tried first on several time steps at once: what differs from one by one mixes time steps."""
    if isinstance(layer, keras.layers.Bidirectional):
        raise ExportError(f"layer {layer.name!r} reads the sequence backwards too: it cannot be stepped")

    def call(*args: Any, **kwargs: Any) -> Any:
        if _takes_time(layer):
            rng = np.random.default_rng(0)

            def longer(tensor: Any) -> Any:
                shape = (tensor.shape[0], 3, *tensor.shape[2:])
                values = rng.normal(size=shape) if _is_float(str(tensor.dtype)) else rng.integers(0, 2, shape)
                return ops.convert_to_tensor(values, dtype=tensor.dtype)

            probe = tree.map_structure(longer, args)
            whole = np.asarray(layer(*probe, **kwargs))
            for t in range(3):
                one = np.asarray(layer(*tree.map_structure(lambda v, t=t: v[:, t : t + 1], probe), **kwargs))
                part = whole[:, t : t + 1]
                if whole.shape[1:2] != (3,) or one.shape != part.shape or not np.allclose(one, part, 1e-4, 1e-4):
                    raise ExportError(
                        f"layer {layer.name!r} ({type(layer).__name__}) mixes time steps: a network with it cannot be "
                        f"stepped; use layers that act on each time step by itself around the recurrent ones"
                    )
        return layer(*args, **kwargs)

    return call


def _refuse_masking(layer: Any) -> None:
    if isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False):
        raise ExportError(
            f"layer {layer.name!r} masks time steps, which the service does by each request's lengths: "
            f"export the network without it (padding needs no mask where sequences are served unpadded)"
        )


def _takes_time(layer: Any) -> bool:
    """Says whether the layer's input has a time axis still, by the symbolic shape that Keras keeps of it."""
    shapes = [tensor.shape for node in layer._inbound_nodes for tensor in node.input_tensors]
    return any(len(shape) > 1 and shape[1] is None for shape in shapes)


def _refuse_unsteppable(layer: Any, sequence: Any) -> None:
    reasons = {
        "reads the sequence backwards (go_backwards)": layer.go_backwards,
        "gives its states as outputs (return_state)": layer.return_state,
        "takes constants": bool(getattr(layer, "_num_constants", 0)),
        "does not run over the input's time axis": sequence.ndim < 3 or sequence.shape[1] != 1,
        "starts from another layer's states (initial_state)": any(
            len(node.input_tensors) > 1 for node in layer._inbound_nodes
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ExportError(f"layer {layer.name!r} {reason}: it cannot be stepped")


def _cells(layer: Any) -> list[Any]:
    """Gives a recurrent layer's cells, from input to output."""
    return list(layer.cell.cells) if type(layer.cell) is keras.layers.StackedRNNCells else [layer.cell]


def _initial_states(cell: Any, layer: str) -> Any:
    """Gives a cell's states before the first step for a batch of two, as the list that the cell takes."""
    if hasattr(cell, "get_initial_state"):
        initial = cell.get_initial_state(batch_size=2)
    else:
        sizes = cell.state_size if isinstance(cell.state_size, list | tuple) else [cell.state_size]
        initial = [ops.zeros((2, *(size if isinstance(size, tuple) else (size,)))) for size in sizes]
    initial = list(initial) if isinstance(initial, list | tuple) else [initial]
    if any(np.any(np.asarray(state)) for state in tree.flatten(initial)):
        raise ExportError(
            f"layer {layer!r}: its cell starts from states that are not zero, and sessions start from zeros: "
            f"let get_initial_state give zeros and send the states with the first request"
        )
    return initial


def _state_names(cell: Any, count: int) -> Iterator[str]:
    names = getattr(cell, "state_names", None)
    if names is None and isinstance(cell, keras.layers.LSTMCell):
        names = ("h", "c")
    if names is None or len(names) != count:
        names = ("state",) if count == 1 else tuple(f"state{place}" for place in range(count))
    return iter(names)
