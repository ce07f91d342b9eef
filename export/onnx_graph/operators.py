"""Registry, open to users, of ways to write a recurrence as one ONNX operator, by the type of the cell.

A lowering writes a cell run over time with an operator that has a fast kernel in ONNX Runtime. It is used only if it is
proved exact and equal to Keras, and measured to be faster than the general form. Lowerings know nothing of masks:
`masking.py` moves masked steps out of the way before the operator and back after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np

from cellserve.export.onnx_graph.builder import GraphBuilder
from cellserve.export.onnx_graph.nan_guard import is_bounded, nan_guard, nan_guard_over_time
from cellserve.models.cells import LSTMCell

# (graph, cell, x [time, batch, features], lengths [batch], states [batch, units]) -> (y [time, batch, units], states)
Lowering = Callable[[GraphBuilder, Any, str, str, Sequence[str]], tuple[str, list[str]]]


class _Entry(NamedTuple):
    lowering: Lowering
    holds: Callable[[Any], bool]


LOWERINGS: dict[type, _Entry] = {}


def lowers(cell_type: type, when: Callable[[Any], bool] = lambda cell: True) -> Callable[[Lowering], Lowering]:
    """Decorator that registers a function as the lowering of a type of cell.

    Args:
        cell_type: The cell's class. Subclasses are not included, as they may compute something else.
        when: Whether the lowering is valid for a cell, by its arguments (its activations, say).

    Example:
        >>> @lowers(MyCell, when=lambda cell: not cell.clips)
        ... def my_operator(graph, cell, x, lengths, states):
        ...     y, h = graph.node("GRU", x, ..., lengths, ..., outputs=2, hidden_size=cell.units)
        ...     return first_direction(graph, y, h)
    """

    def register(lowering: Lowering) -> Lowering:
        LOWERINGS[cell_type] = _Entry(lowering, when)
        return lowering

    return register


def lowering_of(cell: Any) -> Lowering | None:
    """The lowering of a cell, or None. Types must be equal, as a subclass may compute something else."""
    entry = LOWERINGS.get(type(cell))
    return entry.lowering if entry and entry.holds(cell) else None


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of a recurrent operator: gates one after another in the last axis, in the operator's order."""

    input_kernel: Any  # [features, gates * units], as in Keras
    recurrent_kernel: Any  # [units, gates * units]
    bias: Any  # [gates * units], added to the input's product
    recurrent_bias: Any = None  # [gates * units]; None for zeros
    peepholes: Any = None  # [3 * units], of an LSTM's gates i, o and f; None for an LSTM without them


def recurrent_operator(
    graph: GraphBuilder, operator: str, x: str, lengths: str, states: Sequence[str], weights: Weights, **attributes: Any
) -> tuple[str, list[str]]:
    """Writes ONNX's `LSTM`, `GRU` or `RNN` in one direction.

    Args:
        graph: The graph to write to.
        operator: The operator's name.
        x: Name of the input, `[time, batch, features]`.
        lengths: Name of the lengths, `[batch]`, or "".
        states: Names of the states, each `[batch, units]`.
        weights: The operator's weights.
        attributes: The operator's other attributes.

    Returns:
        y `[time, batch, units]` and the states after each row's length, `[batch, units]`.
    """
    bias, recurrent_bias = np.asarray(weights.bias), weights.recurrent_bias
    biases = np.concatenate([bias, np.zeros_like(bias) if recurrent_bias is None else recurrent_bias])
    kernel = graph.constant(np.asarray(weights.input_kernel).T[None])
    y, *final = graph.node(
        operator,
        x,
        kernel,
        graph.constant(np.asarray(weights.recurrent_kernel).T[None]),
        graph.constant(biases[None]),
        lengths,
        *(graph.node("Unsqueeze", state, graph.constant(np.array([0]))) for state in states),
        *([] if weights.peepholes is None else [graph.constant(weights.peepholes[None])]),
        outputs=1 + len(states),
        hidden_size=np.shape(weights.recurrent_kernel)[0],
        **attributes,
    )
    if not graph.returns_states and not is_bounded(graph, x):
        y = graph.node("Add", y, nan_guard_over_time(graph, x, kernel))
    elif not is_bounded(graph, x):
        final[0] = graph.node("Add", final[0], nan_guard(graph, x, lengths, kernel))
    y = graph.node("Squeeze", y, graph.constant(np.array([1])))
    return y, [graph.node("Squeeze", state, graph.constant(np.array([0]))) for state in final]


def _regular(cell: Any) -> bool:
    """Whether a Keras cell has the standard activations; with others it takes the general form."""
    activations = keras.activations
    return cell.activation is activations.tanh and cell.recurrent_activation is activations.sigmoid


@lowers(LSTMCell)
def lstm(graph: GraphBuilder, cell: Any, x: str, lengths: str, states: Sequence[str]) -> tuple[str, list[str]]:
    """Writes `LSTMCell` as ONNX's `LSTM`, whose gates are in the order i, o, f, c."""
    kernel = np.concatenate([np.asarray(kernel) for kernel in (cell.W_i, cell.W_o, cell.W_f, cell.W_c)], axis=1)
    bias = np.concatenate([np.asarray(bias) for bias in (cell.b_i, cell.b_o, cell.b_f, cell.b_c)])
    weights = Weights(kernel[cell.units :], kernel[: cell.units], bias)
    return recurrent_operator(graph, "LSTM", x, lengths, states, weights)


@lowers(keras.layers.LSTMCell, when=_regular)
def keras_lstm(graph: GraphBuilder, cell: Any, x: str, lengths: str, states: Sequence[str]) -> tuple[str, list[str]]:
    """Writes Keras's `LSTMCell`, whose gates are in the order i, f, c, o, as ONNX's `LSTM`."""
    bias = cell.bias if cell.use_bias else np.zeros(4 * cell.units, np.float32)
    kernels = [_gates(kernel, (0, 3, 1, 2)) for kernel in (cell.kernel, cell.recurrent_kernel, bias)]
    return recurrent_operator(graph, "LSTM", x, lengths, states, Weights(*kernels))


@lowers(keras.layers.GRUCell, when=_regular)
def keras_gru(graph: GraphBuilder, cell: Any, x: str, lengths: str, states: Sequence[str]) -> tuple[str, list[str]]:
    """Writes Keras's `GRUCell` as ONNX's `GRU`; the order of the gates is the same: z, r, h."""
    bias = np.asarray(cell.bias) if cell.use_bias else np.zeros(3 * cell.units, np.float32)
    biases = tuple(bias) if bias.ndim == 2 else (bias,)  # with `reset_after` there is a recurrent bias too
    weights = Weights(cell.kernel, cell.recurrent_kernel, *biases)
    after = int(cell.reset_after)
    return recurrent_operator(graph, "GRU", x, lengths, states, weights, linear_before_reset=after)


def _gates(kernel: Any, order: Sequence[int]) -> np.ndarray:
    """Reorders the four gates of weights `[..., 4 * units]`."""
    parts = np.split(np.asarray(kernel), 4, axis=-1)
    return np.concatenate([parts[place] for place in order], axis=-1)
