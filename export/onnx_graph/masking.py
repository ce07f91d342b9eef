"""A masked recurrence as an operator that knows no masks: the steps that count are moved together, and back again.

Each row's valid steps are moved to its front, in their order; the operator runs over as many of them as the row has;
every step then takes the output of the last valid step up to it, which is what a mask in Keras means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto

from cellserve.export.keras_model.recurrences import Recurrence
from cellserve.export.onnx_graph.builder import GraphBuilder

Run = Callable[[str, str, Sequence[str]], tuple[str, list[str]]]  # (x, lengths, states) -> (y, states)


def one_step(
    graph: GraphBuilder, recurrence: Recurrence, run: Run, x: str, mask: str, states: Sequence[str]
) -> tuple[str, list[str]]:
    """Writes a masked recurrence over a time axis of one.

    Args:
        graph: Where to.
        recurrence: Says what a masked step gives.
        run: Writes the recurrence without the mask.
        x: `[1, batch, features]`.
        mask: `[1, batch]` bool.
        states: Each `[batch, ...]`.

    Returns:
        y `[1, batch, units]`, next states.
    """
    y, final = run(x, "", states[: recurrence.own])
    column = graph.node("Unsqueeze", mask, graph.constant(np.array([2])))
    row = graph.node("Squeeze", column, graph.constant(np.array([0])))
    final += [graph.node("Squeeze", y, graph.constant(np.array([0])))] * (len(states) - recurrence.own)
    final = [graph.node("Where", row, new, old) for new, old in zip(final, states, strict=True)]
    return _otherwise(graph, recurrence, column, y, states), final


def over_time(
    graph: GraphBuilder, recurrence: Recurrence, run: Run, x: str, mask: str, lengths: str, states: Sequence[str]
) -> tuple[str, list[str]]:
    """Writes a masked recurrence over time: as `one_step`, with x and mask over time and lengths `[batch]` or ""."""
    first, last = graph.constant(np.array([0])), graph.constant(np.array([2]))
    time = graph.node("Shape", mask, start=0, end=1)
    steps = graph.node("Range", graph.constant(np.array(0)), graph.node("Squeeze", time), graph.constant(np.array(1)))
    steps = graph.node("Unsqueeze", steps, graph.constant(np.array([1])))  # [time, 1]
    valid = mask
    if lengths:
        valid = graph.node("And", mask, graph.node("Less", steps, graph.node("Cast", lengths, to=TensorProto.INT64)))
    ones = graph.node("Cast", valid, to=TensorProto.INT64)
    # Descending, the valid steps come first, each kind in its order: their keys are time - step, the others' -step.
    keys = graph.node("Sub", graph.node("Mul", ones, time), steps)
    _, order = graph.node("TopK", keys, time, axis=0, outputs=2)
    count = graph.node("ReduceSum", ones, first, keepdims=0)  # [batch]
    at_least_one = graph.node("Cast", graph.node("Max", count, graph.constant(np.array(1))), to=TensorProto.INT32)
    y, final = run(_picked(graph, x, order), at_least_one, states[: recurrence.own])

    place = graph.node("Sub", graph.node("CumSum", ones, graph.constant(np.array(0))), graph.constant(np.array(1)))
    y = _picked(graph, y, graph.node("Max", place, graph.constant(np.array(0))))
    begun = graph.node("Unsqueeze", graph.node("GreaterOrEqual", place, graph.constant(np.array(0))), last)
    if recurrence.zeros:
        begun = graph.node("Unsqueeze", valid, last)
    y = _otherwise(graph, recurrence, begun, y, states)
    moved = graph.node("Unsqueeze", graph.node("Greater", count, first), graph.constant(np.array([1])))
    final = [graph.node("Where", moved, new, old) for new, old in zip(final, states, strict=False)]
    if len(states) > recurrence.own:
        final.append(graph.node("Gather", y, graph.constant(np.array(-1)), axis=0))
    return y, final


def _otherwise(graph: GraphBuilder, recurrence: Recurrence, holds: str, y: str, states: Sequence[str]) -> str:
    """Gives y where `holds`, and else what the layer gives at a masked step."""
    if recurrence.zeros:
        return str(graph.node("Where", holds, y, graph.constant(np.zeros((), np.float32))))
    if recurrence.repeats is not None:
        return str(graph.node("Where", holds, y, states[recurrence.repeats]))
    return y


def _picked(graph: GraphBuilder, tensor: str, places: str) -> str:
    """Gives `tensor [time, batch, width]` with each row's time steps taken from `places [time, batch]`."""
    column = graph.node("Unsqueeze", places, graph.constant(np.array([2])))
    return str(graph.node("GatherElements", tensor, graph.node("Expand", column, graph.node("Shape", tensor)), axis=0))
