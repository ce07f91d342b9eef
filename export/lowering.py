"""Forms of whole recurrences as one ONNX operator, by the type of the cell.

A lowering says how a cell run over time is written with an operator that ONNX Runtime has a fast kernel for. It is
used only where the proof shows it equal to Keras and exact, and the measurement shows it faster than the general form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from export.graph import GraphBuilder
from models.cells import LSTMCell

# (graph, cell, x [time, batch, features], lengths [batch], states [batch, units]) -> (y [time, batch, units], states)
Lowering = Callable[[GraphBuilder, Any, str, str, Sequence[str]], tuple[str, list[str]]]


def lowering_of(cell: Any) -> Lowering | None:
    """Gives the operator form of a cell, or None: a subclass may compute something else, so types must be the same."""
    return LOWERINGS.get(type(cell))


def lstm(graph: GraphBuilder, cell: Any, x: str, lengths: str, states: Sequence[str]) -> tuple[str, list[str]]:
    """Writes `LSTMCell` as ONNX's `LSTM` (gates in the order i, o, f, c; weights transposed, input's apart)."""
    gates = [(cell.W_i, cell.b_i), (cell.W_o, cell.b_o), (cell.W_f, cell.b_f), (cell.W_c, cell.b_c)]
    kernels = np.concatenate([np.asarray(kernel).T for kernel, _ in gates])  # [4 units, units + features]
    bias = np.concatenate([np.asarray(bias) for _, bias in gates])
    y, h, c = graph.node(
        "LSTM",
        x,
        graph.constant(kernels[None, :, cell.units :]),
        graph.constant(kernels[None, :, : cell.units]),
        graph.constant(np.concatenate([bias, np.zeros_like(bias)])[None]),
        lengths,
        *(graph.node("Unsqueeze", state, graph.constant(np.array([0]))) for state in states),
        outputs=3,
        hidden_size=cell.units,
    )
    y = graph.node("Squeeze", y, graph.constant(np.array([1])))
    return y, [graph.node("Squeeze", state, graph.constant(np.array([0]))) for state in (h, c)]


LOWERINGS: dict[type, Lowering] = {LSTMCell: lstm}
