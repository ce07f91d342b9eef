"""Writes a masked recurrence with an operator without masks: compacts the valid steps, runs it, scatters them back.

Each row's valid steps are moved to its front in order, the operator runs over them, and every step then takes the
output of the last valid step up to it, as a mask in Keras means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from cellserve.export.keras_model.recurrences import Recurrence
from cellserve.export.onnx_graph.builder import GraphBuilder

Run = Callable[[str, str, Sequence[str]], tuple[str, list[str]]]  # (x, lengths, states) -> (y, states)


class Masked(NamedTuple):
    """Names of the inputs of a masked recurrence."""

    x: str  # [time, batch, features]
    mask: str  # [time, batch] bool
    states: Sequence[str]  # each [batch, ...]
    lengths: str = ""  # [batch]


def one_step(graph: GraphBuilder, recurrence: Recurrence, run: Run, inputs: Masked) -> tuple[str, list[str]]:
    """Writes a masked recurrence over a time axis of one.

    Args:
        graph: The graph to write to.
        recurrence: Determines the output of a masked step.
        run: Writes the recurrence without the mask.
        inputs: Names of the inputs, with a time axis of one.

    Returns:
        y `[1, batch, units]`, next states.
    """
    x, mask, states, _ = inputs
    y, final = run(x, "", states[: recurrence.cell_state_count])
    column = graph.node("Unsqueeze", mask, graph.constant(np.array([2])))
    row = graph.node("Squeeze", column, graph.constant(np.array([0])))
    final += [graph.node("Squeeze", y, graph.constant(np.array([0])))] * (len(states) - recurrence.cell_state_count)
    final = [graph.node("Where", row, new, old) for new, old in zip(final, states, strict=True)]
    return _mask_select(graph, recurrence, column, y, states), final


def over_time(graph: GraphBuilder, recurrence: Recurrence, run: Run, inputs: Masked) -> tuple[str, list[str]]:
    """Writes a masked recurrence over time; arguments as for `one_step`."""
    x, mask, states, lengths = inputs
    first, last = graph.constant(np.array([0])), graph.constant(np.array([2]))
    time = graph.node("Shape", mask, start=0, end=1)
    steps = graph.node("Range", graph.constant(np.array(0)), graph.node("Squeeze", time), graph.constant(np.array(1)))
    steps = graph.node("Unsqueeze", steps, graph.constant(np.array([1])))  # [time, 1]
    valid = mask
    if lengths:
        valid = graph.node("And", mask, graph.node("Less", steps, graph.node("Cast", lengths, to=TensorProto.INT64)))
    ones = graph.node("Cast", valid, to=TensorProto.INT64)
    # Keys in descending order: valid steps first (time - step), then the others (-step), each kind in its order.
    keys = graph.node("Sub", graph.node("Mul", ones, time), steps)
    _, order = graph.node("TopK", keys, time, axis=0, outputs=2)
    count = graph.node("ReduceSum", ones, first, keepdims=0)  # [batch]
    at_least_one = graph.node("Cast", graph.node("Max", count, graph.constant(np.array(1))), to=TensorProto.INT32)
    y, final = run(_gather_rows(graph, x, order), at_least_one, states[: recurrence.cell_state_count])

    place = graph.node("Sub", graph.node("CumSum", ones, graph.constant(np.array(0))), graph.constant(np.array(1)))
    y = _gather_rows(graph, y, graph.node("Max", place, graph.constant(np.array(0))))
    begun = graph.node("Unsqueeze", graph.node("GreaterOrEqual", place, graph.constant(np.array(0))), last)
    if recurrence.zeros:
        begun = graph.node("Unsqueeze", valid, last)
    y = _mask_select(graph, recurrence, begun, y, states)
    moved = graph.node("Unsqueeze", graph.node("Greater", count, first), graph.constant(np.array([1])))
    final = [graph.node("Where", moved, new, old) for new, old in zip(final, states, strict=False)]
    if len(states) > recurrence.cell_state_count:
        final.append(graph.node("Gather", y, graph.constant(np.array(-1)), axis=0))
    return y, final


def _mask_select(graph: GraphBuilder, recurrence: Recurrence, holds: str, y: str, states: Sequence[str]) -> str:
    """Selects y where `holds`, otherwise the layer's output for a masked step."""
    if recurrence.zeros:
        return str(graph.node("Where", holds, y, graph.constant(np.zeros((), np.float32))))
    if recurrence.repeats is not None:
        return str(graph.node("Where", holds, y, states[recurrence.repeats]))
    return y


def _gather_rows(graph: GraphBuilder, tensor: str, places: str) -> str:
    """Gathers each row's time steps of `tensor [time, batch, width]` by index, `places [time, batch]`."""
    column = graph.node("Unsqueeze", places, graph.constant(np.array([2])))
    return str(graph.node("GatherElements", tensor, graph.node("Expand", column, graph.node("Shape", tensor)), axis=0))
