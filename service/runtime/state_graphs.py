"""The graphs that keep states on a device: a model's around tables of states, and those that read and write tables.

A table `[capacity, *shape]` holds one state of many sessions, a row each. A run gathers rows (`sources`), advances
them, and scatters them into others (`targets`) of the same table, which is an input and an output bound to the same
memory: ONNX Runtime's ScatterND copies nothing else then, on the CPU and on CUDA (core/providers/*/scatter_nd.cc).
"""

from __future__ import annotations

from collections.abc import Sequence

from cellserve.models.signature import Signature, StateSpec
from cellserve.service.runtime.onnx_writer import (
    false,
    graph_input,
    graph_output,
    integers,
    model,
    node,
    opset,
    surrounded,
    zero,
)

_OWN = "cellserve."  # the names of what is added to a model's graph
SOURCES, TARGETS, FINITE = f"{_OWN}sources", f"{_OWN}targets", f"{_OWN}finite"
_ZERO, _NEVER, _AXES = f"{_OWN}zero", f"{_OWN}never", f"{_OWN}axes"
_ROWS, _CAPACITY = f"{_OWN}rows", f"{_OWN}capacity"  # lengths of axes
_FIRST_OPSET = 11  # with ScatterND
_AXES_ARE_INPUTS = 13  # of ReduceSum, from this opset on


def table_in(spec: StateSpec) -> str:
    """Returns the name of the input that is a state's table."""
    return f"{_OWN}table.{spec.name}"


def table_out(spec: StateSpec) -> str:
    """Returns the name of the output that is the same table after the run."""
    return f"{_OWN}table.{spec.next_name}"


def own_tensor(name: str) -> str | None:
    """Returns the signature's name for an input or output of a model around tables; None for what was added."""
    if name.startswith(f"{_OWN}table."):
        return name.removeprefix(f"{_OWN}table.")
    return None if name.startswith(_OWN) else name


def can_keep(content: bytes, signature: Signature) -> bool:
    """Whether a model file can be put around tables."""
    return bool(signature.states) and signature.predict_only is None and opset(content) >= _FIRST_OPSET


def around_tables(content: bytes, signature: Signature) -> bytes:
    """Returns a model file whose states are rows of tables instead of inputs and outputs.

    Beside the tables it takes `sources [rows]` and `targets [rows, 1]`, int64, and returns `finite [rows]`: 0 for rows
    whose next states are finite, NaN for others.
    """
    before = [graph_input(SOURCES, "int64", [_ROWS]), graph_input(TARGETS, "int64", [_ROWS, 1])]
    after = []
    sums: list[str] = []
    axes_are_inputs = opset(content) >= _AXES_ARE_INPUTS
    several_calls = not signature.time_axis or signature.lengths is None
    if several_calls:
        before.append(false(_NEVER))
    for spec in signature.states:
        before.append(graph_input(table_in(spec), spec.dtype, [_CAPACITY, *spec.shape]))
        axis, rank = spec.batch_axis, 1 + len(spec.shape)
        gathered = spec.name if axis == 0 else f"{table_in(spec)}.gathered"
        before.append(node("Gather", [table_in(spec), SOURCES], [gathered], axis=0))
        following = spec.next_name
        if axis != 0:
            to_front = (axis, *range(axis), *range(axis + 1, rank))
            to_place = [to_front.index(place) for place in range(rank)]
            before.append(node("Transpose", [gathered], [spec.name], perm=to_place))
            following = f"{table_out(spec)}.rows"
            after.append(node("Transpose", [spec.next_name], [following], perm=to_front))
        written = following
        if several_calls:
            # A row may be source and target: the old state must have been gathered, even if the next one needs it not.
            written = f"{table_out(spec)}.after"
            after.append(node("Where", [_NEVER, gathered, following], [written]))
        after.append(node("ScatterND", [table_in(spec), TARGETS, written], [table_out(spec)]))
        after.append(graph_output(table_out(spec), spec.dtype, [_CAPACITY, *spec.shape]))
        if spec.dtype == "float32":
            # 0 times infinity, or NaN, is NaN, and so is a sum with it.
            nothing = f"{table_out(spec)}.nothing"
            after.append(node("Mul", [following, _ZERO], [nothing]))
            sums.append(nothing)
            if rank > 1:
                sums[-1] = f"{nothing}.sum"
                if axes_are_inputs:
                    axes = f"{_AXES}.{rank}"
                    after.append(node("ReduceSum", [nothing, axes], [sums[-1]], keepdims=0))
                else:
                    after.append(node("ReduceSum", [nothing], [sums[-1]], axes=range(1, rank), keepdims=0))
    if sums:
        before.append(zero(_ZERO))
        if axes_are_inputs:
            ranks = {1 + len(spec.shape) for spec in signature.states if spec.dtype == "float32"}
            before += [integers(f"{_AXES}.{rank}", range(1, rank)) for rank in ranks if rank > 1]
        after.append(node("Sum", sums, [FINITE]))
        after.append(graph_output(FINITE, "float32", [_ROWS]))
    names, next_names = {spec.name for spec in signature.states}, {spec.next_name for spec in signature.states}
    return surrounded(content, before, after, internal=names, hidden=next_names)


def reading_graph(states: Sequence[StateSpec]) -> bytes:
    """Returns a model file that takes tables and `sources`, and returns these rows of each."""
    fields = [graph_input(SOURCES, "int64", [_ROWS])]
    for spec in states:
        fields.append(graph_input(table_in(spec), spec.dtype, [_CAPACITY, *spec.shape]))
        fields.append(node("Gather", [table_in(spec), SOURCES], [spec.name], axis=0))
        fields.append(graph_output(spec.name, spec.dtype, [_ROWS, *spec.shape]))
    return model(fields)


def writing_graph(states: Sequence[StateSpec]) -> bytes:
    """Returns a model file that takes tables, `targets` and rows, and writes the rows into the tables."""
    fields = [graph_input(TARGETS, "int64", [_ROWS, 1])]
    for spec in states:
        fields.append(graph_input(table_in(spec), spec.dtype, [_CAPACITY, *spec.shape]))
        fields.append(graph_input(spec.name, spec.dtype, [_ROWS, *spec.shape]))
        fields.append(node("ScatterND", [table_in(spec), TARGETS, spec.name], [table_out(spec)]))
        fields.append(graph_output(table_out(spec), spec.dtype, [_CAPACITY, *spec.shape]))
    return model(fields)
