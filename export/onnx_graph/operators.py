"""Forms of whole recurrences as one ONNX operator, by the type of the cell: a registry that is open to users.

A lowering says how a cell run over time is written with an operator that ONNX Runtime has a fast kernel for. It is
used only where the proof shows it equal to Keras and exact, and the measurement shows it faster than the general form.
A mask is not its matter: what is masked is moved out of the way before and put back after (`masking.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from cellserve.export.onnx_graph.builder import GraphBuilder
from cellserve.models.cells import LSTMCell

# (graph, cell, x [time, batch, features], lengths [batch], states [batch, units]) -> (y [time, batch, units], states)
Lowering = Callable[[GraphBuilder, Any, str, str, Sequence[str]], tuple[str, list[str]]]


class _Entry(NamedTuple):
    lowering: Lowering
    holds: Callable[[Any], bool]


LOWERINGS: dict[type, _Entry] = {}


def lowers(cell_type: type, when: Callable[[Any], bool] = lambda cell: True) -> Callable[[Lowering], Lowering]:
    """Registers the function below it as the operator form of a type of cell.

    Args:
        cell_type: The cell's class. Its subclasses are not meant: they may compute something else.
        when: Says of a cell whether the form holds for it, by its arguments (its activations, say).

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
    """Gives the operator form of a cell, or None: a subclass may compute something else, so types must be the same."""
    entry = LOWERINGS.get(type(cell))
    return entry.lowering if entry and entry.holds(cell) else None


def recurrent_operator(
    graph: GraphBuilder,
    operator: str,
    x: str,
    lengths: str,
    states: Sequence[str],
    input_kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray,
    recurrent_bias: np.ndarray | None = None,
    peepholes: np.ndarray | None = None,
    **attributes: Any,
) -> tuple[str, list[str]]:
    """Writes ONNX's `LSTM`, `GRU` or `RNN` in one direction; its gates stand one behind the other in every weight.

    Args:
        graph: Where to.
        operator: Its name.
        x: `[time, batch, features]`.
        lengths: `[batch]`, or "".
        states: Each `[batch, units]`.
        input_kernel: `[features, gates * units]`, as Keras has it, gates in the operator's order.
        recurrent_kernel: `[units, gates * units]`.
        bias: `[gates * units]`, of the input.
        recurrent_bias: `[gates * units]`; zeros where there is none.
        peepholes: `[3 * units]`, of an LSTM's gates i, o and f.
        attributes: Of the operator.

    Returns:
        y `[time, batch, units]` and the states after each row's length, `[batch, units]`.
    """
    bias = np.asarray(bias)
    both = np.concatenate([bias, np.zeros_like(bias) if recurrent_bias is None else recurrent_bias])
    y, *final = graph.node(
        operator,
        x,
        graph.constant(np.asarray(input_kernel).T[None]),
        graph.constant(np.asarray(recurrent_kernel).T[None]),
        graph.constant(both[None]),
        lengths,
        *(graph.node("Unsqueeze", state, graph.constant(np.array([0]))) for state in states),
        *([] if peepholes is None else [graph.constant(peepholes[None])]),
        outputs=1 + len(states),
        hidden_size=np.shape(recurrent_kernel)[0],
        **attributes,
    )
    y = graph.node("Squeeze", y, graph.constant(np.array([1])))
    return y, [graph.node("Squeeze", state, graph.constant(np.array([0]))) for state in final]


def _regular(cell: Any) -> bool:
    """Says whether a Keras cell has the activations of the paper; with others it takes the general form."""
    activations = keras.activations
    return cell.activation is activations.tanh and cell.recurrent_activation is activations.sigmoid


@lowers(LSTMCell)
def lstm(graph: GraphBuilder, cell: Any, x: str, lengths: str, states: Sequence[str]) -> tuple[str, list[str]]:
    """Writes `LSTMCell` as ONNX's `LSTM`, whose gates stand in the order i, o, f, c."""
    kernel = np.concatenate([np.asarray(kernel) for kernel in (cell.W_i, cell.W_o, cell.W_f, cell.W_c)], axis=1)
    bias = np.concatenate([np.asarray(bias) for bias in (cell.b_i, cell.b_o, cell.b_f, cell.b_c)])
    return recurrent_operator(graph, "LSTM", x, lengths, states, kernel[cell.units :], kernel[: cell.units], bias)


@lowers(keras.layers.LSTMCell, when=_regular)
def keras_lstm(graph: GraphBuilder, cell: Any, x: str, lengths: str, states: Sequence[str]) -> tuple[str, list[str]]:
    """Writes Keras's `LSTMCell`, whose gates stand in the order i, f, c, o, as ONNX's `LSTM`."""
    bias = cell.bias if cell.use_bias else np.zeros(4 * cell.units, np.float32)
    kernels = [_gates(kernel, (0, 3, 1, 2)) for kernel in (cell.kernel, cell.recurrent_kernel, bias)]
    return recurrent_operator(graph, "LSTM", x, lengths, states, *kernels)


@lowers(keras.layers.GRUCell, when=_regular)
def keras_gru(graph: GraphBuilder, cell: Any, x: str, lengths: str, states: Sequence[str]) -> tuple[str, list[str]]:
    """Writes Keras's `GRUCell` as ONNX's `GRU`; the order of the gates is the same: z, r, h."""
    bias = np.asarray(cell.bias) if cell.use_bias else np.zeros(3 * cell.units, np.float32)
    biases = tuple(bias) if bias.ndim == 2 else (bias,)  # with `reset_after` the recurrent kernel has one of its own
    kernels = np.asarray(cell.kernel), np.asarray(cell.recurrent_kernel)
    after = int(cell.reset_after)
    return recurrent_operator(graph, "GRU", x, lengths, states, *kernels, *biases, linear_before_reset=after)


def _gates(kernel: Any, order: Sequence[int]) -> np.ndarray:
    """Gives weights `[..., 4 * units]` with their four gates in another order."""
    parts = np.split(np.asarray(kernel), 4, axis=-1)
    return np.concatenate([parts[place] for place in order], axis=-1)
