"""Cells where they stand in a network: their states, one call of them, and what a mask does to both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from cellserve.export.errors import ExportError, first_line


@dataclass(frozen=True, slots=True)
class State:
    """One tensor that a recurrence carries from step to step."""

    name: str  # layer.state, such as lstm.h
    shape: tuple[int, ...]  # without the batch axis
    dtype: str


@dataclass(frozen=True, slots=True)
class Recurrence:
    """One cell where it stands in the network, and what it carries.

    A masked time step changes no state. What the layer gives at it is Keras's choice too: the output of the step before
    (a state then: one that the cell has where its output is its state, or one more), or zeros.
    """

    layer: str
    cell: Any
    states: tuple[State, ...]
    output_shape: tuple[int, ...]  # of one step, without the batch axis
    nesting: Any  # the states as the cell takes them, lists within lists
    masked: bool = False  # time steps may be masked
    repeats: int | None = None  # the state that holds the output of the step before, where a masked step gives that
    zeros: bool = False  # a masked step gives zeros

    @property
    def own(self) -> int:
        """How many states the cell itself has: all, but for the output that a mask makes one."""
        return len(tree.flatten(self.nesting))

    def call(self, x: Any, states: list[Any], mask: Any) -> tuple[Any, list[Any]]:
        """Calls the cell on `x [batch, *features]`; gives its output and its next states as a flat list.

        Args:
            x: One time step.
            states: One tensor a state.
            mask: `[batch]` bool, or None where no step is masked.
        """
        y, new = self.cell(x, tree.pack_sequence_as(self.nesting, states[: self.own]))
        following = tree.flatten(new)
        if mask is None:
            return y, following
        following += [y] * (len(self.states) - self.own)
        following = [ops.where(_like(mask, new), new, old) for new, old in zip(following, states, strict=True)]
        if self.zeros:
            y = ops.where(_like(mask, y), y, ops.zeros_like(y))
        elif self.repeats is not None:
            y = following[self.repeats]
        return y, following

    def run(self, x: Any, states: list[Any], mask: Any) -> tuple[Any, list[Any]]:
        """Runs Keras's own loop over `x [batch, time, *features]` from given states, with a mask `[batch, time]`.

        Before its first step that is not masked Keras gives zeros, not knowing what was before: the state is put there.
        """
        loop = keras.layers.RNN(self.cell, return_sequences=True, return_state=True, zero_output_for_mask=self.zeros)
        initial = tree.pack_sequence_as(self.nesting, states[: self.own])
        y, *new = loop(x, initial_state=initial, mask=mask)
        following = tree.flatten(new)
        if mask is not None and self.repeats is not None:
            begun = ops.cumsum(ops.cast(mask, "int32"), axis=1) > 0
            y = ops.where(_like(begun, y), y, ops.expand_dims(states[self.repeats], 1))
            following += [y[:, -1]] * (len(self.states) - self.own)
        return y, following


def recurrences_of(layer: Any, name: str, x: Any, mask: Any) -> Iterator[tuple[Recurrence, Any]]:
    """Calls a recurrent layer's cells in turn on one time step `x [2, *features]`; gives each as it is and its output.

    Args:
        layer: A `keras.layers.RNN`, which Keras's own recurrent layers are too.
        name: Of the layer in the names of states.
        x: Any one time step.
        mask: `[2]` bool, or None where the layer gets no mask.

    Raises:
        ExportError: A cell cannot be called on one step, or starts from states that are not zero.
    """
    cells = cells_of(layer)
    for place, cell in enumerate(cells):
        initial = _initial_states(layer, cell)
        flat = tree.flatten(initial)
        prefix = name if len(cells) == 1 else f"{name}.{place}"
        states = [
            State(f"{prefix}.{label}", tuple(state.shape[1:]), keras.backend.standardize_dtype(state.dtype))
            for label, state in zip(_state_names(cell, len(flat)), flat, strict=True)
        ]
        try:
            y, new = cell(x, initial)
        except Exception as error:
            raise ExportError(
                f"layer {layer.name!r}: its cell ({type(cell).__name__}) cannot be called on one time step of shape "
                f"{list(x.shape)} and its zero states ({first_line(error)}): a cell's call takes (inputs, states)"
            ) from None
        zeros = repeats = None
        if mask is not None and cell is cells[-1]:  # at a masked step no cell but the last is heard
            zeros = layer.zero_output_for_mask
            same = [at for at, state in enumerate(tree.flatten(new)) if state is y]
            repeats = None if zeros else same[0] if same else len(states)
            if repeats == len(states):
                states.append(State(f"{prefix}.output", tuple(y.shape[1:]), keras.backend.standardize_dtype(y.dtype)))
        nesting = tree.map_structure(lambda _: 0, initial)
        shape = tuple(y.shape[1:])
        yield Recurrence(layer.name, cell, tuple(states), shape, nesting, mask is not None, repeats, bool(zeros)), y
        x = y


def cells_of(layer: Any) -> list[Any]:
    """Gives a recurrent layer's cells, from input to output."""
    return list(layer.cell.cells) if type(layer.cell) is keras.layers.StackedRNNCells else [layer.cell]


def _like(mask: Any, tensor: Any) -> Any:
    """Gives the mask with axes of one behind, to be laid over a tensor."""
    for _ in range(len(tensor.shape) - len(mask.shape)):
        mask = ops.expand_dims(mask, -1)
    return mask


def _initial_states(layer: Any, cell: Any) -> Any:
    """Gives a cell's states before the first step for a batch of two, as the list that the cell takes."""
    if cell is layer.cell:
        initial = layer.get_initial_state(batch_size=2)
    elif hasattr(cell, "get_initial_state"):
        initial = cell.get_initial_state(batch_size=2)
    else:
        sizes = cell.state_size if isinstance(cell.state_size, list | tuple) else [cell.state_size]
        initial = [ops.zeros((2, *(size if isinstance(size, tuple) else (size,)))) for size in sizes]
    initial = list(initial) if isinstance(initial, list | tuple) else [initial]
    initial = tree.map_structure(lambda state: ops.cast(state, layer.cell.compute_dtype), initial)  # as Keras does
    if any(np.any(np.asarray(state)) for state in tree.flatten(initial)):
        raise ExportError(
            f"layer {layer.name!r}: its cell starts from states that are not zero, and sessions start from zeros: "
            f"let get_initial_state give zeros and send the states with the first request"
        )
    return initial


def _state_names(cell: Any, count: int) -> Iterator[str]:
    names = getattr(cell, "state_names", None)
    if names is None and isinstance(cell, keras.layers.LSTMCell):
        names = ("h", "c")
    if names is None and isinstance(cell, keras.layers.GRUCell | keras.layers.SimpleRNNCell):
        names = ("h",)
    if names is None or len(names) != count:
        names = ("state",) if count == 1 else tuple(f"state{place}" for place in range(count))
    return iter(names)
