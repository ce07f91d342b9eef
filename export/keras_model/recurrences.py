"""Cells at their place in a network: their states, one call of a cell, and the effect of a mask on both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from cellserve.export.errors import ExportError, first_line


@dataclass(frozen=True, slots=True)
class RecurrentState:
    """One tensor that a recurrence carries from step to step."""

    name: str  # LAYER.STATE, such as lstm.h
    shape: tuple[int, ...]  # without the batch axis
    dtype: str


@dataclass(frozen=True, slots=True)
class Recurrence:
    """One cell at its place in the network, and its states.

    As in Keras, a masked time step changes no state, and its output is zeros or repeats the step before. The repeated
    output has to be a state: one of the cell's own if the cell's output is a state, otherwise an additional one.
    """

    layer: str
    cell: Any
    states: tuple[RecurrentState, ...]
    output_shape: tuple[int, ...]  # one step, without the batch axis
    nesting: Any  # the structure in which the cell takes its states, lists within lists
    masked: bool = False  # whether time steps may be masked
    repeats: int | None = None  # index of the state with the previous output, if a masked step repeats that output
    zeros: bool = False  # whether the output of a masked step is zeros

    @property
    def cell_state_count(self) -> int:
        """Number of states of the cell itself, without the previous output that a mask adds."""
        return len(tree.flatten(self.nesting))

    def call(self, x: Any, states: list[Any], mask: Any) -> tuple[Any, list[Any]]:
        """Calls the cell on `x [batch, *features]`; returns its output and its next states as a flat list.

        Args:
            x: One time step.
            states: One tensor per state.
            mask: `[batch]` bool, or None where no step is masked.
        """
        y, new = self.cell(x, tree.pack_sequence_as(self.nesting, states[: self.cell_state_count]))
        following = tree.flatten(new)
        if mask is None:
            return y, following
        following += [y] * (len(self.states) - self.cell_state_count)
        following = [ops.where(_like(mask, new), new, old) for new, old in zip(following, states, strict=True)]
        if self.zeros:
            y = ops.where(_like(mask, y), y, ops.zeros_like(y))
        elif self.repeats is not None:
            y = following[self.repeats]
        return y, following

    def run(self, x: Any, states: list[Any], mask: Any) -> tuple[Any, list[Any]]:
        """Runs Keras's own loop over `x [batch, time, *features]` from given states, with a mask `[batch, time]`.

        Before the first unmasked step Keras returns zeros, as it knows no previous output; here the state is returned.
        """
        loop = keras.layers.RNN(
            self.cell,
            return_sequences=True,
            return_state=True,
            zero_output_for_mask=self.zeros,
            unroll=x.shape[1] == 1,  # TensorFlow's loop takes several times as long as the one step in it
        )
        initial = tree.pack_sequence_as(self.nesting, states[: self.cell_state_count])
        y, *new = loop(x, initial_state=initial, mask=mask)
        following = tree.flatten(new)
        if mask is not None and self.repeats is not None:
            begun = ops.cumsum(ops.cast(mask, "int32"), axis=1) > 0
            y = ops.where(_like(begun, y), y, ops.expand_dims(states[self.repeats], 1))
            following += [y[:, -1]] * (len(self.states) - self.cell_state_count)
        return y, following


def recurrences_of(layer: Any, name: str, x: Any, mask: Any) -> Iterator[tuple[Recurrence, Any]]:
    """Calls a recurrent layer's cells in turn on one time step `x [2, *features]`; yields each one and its output.

    Args:
        layer: A `keras.layers.RNN`; Keras's own recurrent layers are subclasses of it.
        name: The layer's name in the names of states.
        x: Any one time step.
        mask: `[2]` bool, or None if the layer gets no mask.

    Raises:
        ExportError: A cell cannot be called on one step, or starts from states that are not zero.
    """
    cells = cells_of(layer)
    for place, cell in enumerate(cells):
        initial = _initial_states(layer, cell)
        flat = tree.flatten(initial)
        prefix = name if len(cells) == 1 else f"{name}.{place}"
        states = [
            RecurrentState(f"{prefix}.{label}", tuple(state.shape[1:]), keras.backend.standardize_dtype(state.dtype))
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
        if mask is not None and cell is cells[-1]:  # the outputs of the other cells are not used at a masked step
            zeros = layer.zero_output_for_mask
            same = [at for at, state in enumerate(tree.flatten(new)) if state is y]
            repeats = None if zeros else same[0] if same else len(states)
            if repeats == len(states):
                states.append(
                    RecurrentState(f"{prefix}.output", tuple(y.shape[1:]), keras.backend.standardize_dtype(y.dtype))
                )
        nesting = tree.map_structure(lambda _: 0, initial)
        shape = tuple(y.shape[1:])
        yield Recurrence(layer.name, cell, tuple(states), shape, nesting, mask is not None, repeats, bool(zeros)), y
        x = y


def cells_of(layer: Any) -> list[Any]:
    """A recurrent layer's cells, from input to output."""
    return list(layer.cell.cells) if type(layer.cell) is keras.layers.StackedRNNCells else [layer.cell]


def _like(mask: Any, tensor: Any) -> Any:
    """The mask with trailing axes of one, so that it broadcasts over a tensor."""
    for _ in range(len(tensor.shape) - len(mask.shape)):
        mask = ops.expand_dims(mask, -1)
    return mask


def _initial_states(layer: Any, cell: Any) -> Any:
    """A cell's states before the first step for a batch of two, as the list that the cell takes."""
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
            f"let get_initial_state return zeros and send the states with the first request"
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
