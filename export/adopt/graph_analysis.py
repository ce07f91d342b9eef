"""What the nodes of a foreign graph say of its inputs: which are sequences, which are indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cellserve.export.onnx_graph.builder import all_nodes

_RECURRENT, _RECURRENT_RANK, _INITIAL_STATE = {"LSTM", "GRU", "RNN"}, 3, 5  # operators, axes of X, place of initial_h
# Operators that leave the axes of their first input where they are, or those of either input.
_KEEPING = {"Cast", "Dropout", "Elu", "Gelu", "Identity", "LayerNormalization", "LeakyRelu", "Relu", "Sigmoid", "Tanh"}
_KEEPING_EITHER = {"Add", "Div", "Mul", "Sub"}
# Operators that leave the values of an index unchanged on its way to a Gather.
_PASSING = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def recurrent_inputs(graph: Any) -> dict[str, tuple[int, int]]:
    """Returns the inputs that a recurrent operator with a state runs over, by name, with their time and batch axes."""
    found: dict[str, tuple[int, int]] = {}
    for port in graph.input:
        axes = {
            port.name: list(range(len(port.type.tensor_type.shape.dim)))
        }  # tensors along the way, and the input's axes there
        for node in graph.node:
            if node.op_type in _RECURRENT and (own := axes.get(node.input[0])) and len(own) == _RECURRENT_RANK:
                if _is_streamed(graph, node, port.name):
                    found[port.name] = (own[0], own[1])
            elif (passed := _axes_after(node, axes)) is not None:
                axes[node.output[0]] = passed
    return found


def _is_streamed(graph: Any, node: Any, x: str) -> bool:
    """Whether a recurrent operator runs forward, from a state that an input other than x has brought."""
    if any(told.name == "direction" and told.s != b"forward" for told in node.attribute):
        return False
    makers = {name: maker for maker in graph.node for name in maker.output}
    inputs = {port.name for port in graph.input} - {x}
    left, seen = [*node.input[_INITIAL_STATE : _INITIAL_STATE + 1]], set()
    while left:
        name = left.pop()
        if name in inputs:
            return True
        if name in makers and name not in seen:
            seen.add(name)
            left += makers[name].input
    return False


def index_bounds(graph: Any, name: str) -> tuple[int, int] | None:
    """Returns the bounds of an integer input that is only used as an index into constants; None for any other."""
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = list(node.attribute[0].t.dims)
    names, sizes = {name}, set()
    for node in all_nodes(graph.node):
        if not names & set(node.input):
            continue
        if node.op_type in _PASSING and node.input[0] in names:
            names.add(node.output[0])
        elif node.op_type == "Gather" and node.input[1] in names and node.input[0] in constants:
            axis = next((told.i for told in node.attribute if told.name == "axis"), 0)
            sizes.add(constants[node.input[0]][axis])
        elif node.op_type != "Shape":
            return None
    return (0, min(sizes) - 1) if sizes else None


def _axes_after(node: Any, axes: Mapping[str, list[int]]) -> list[int] | None:
    """Where the axes of an input are in a node's output; None if the node moves them in another way."""
    traced = [axes.get(name) for name in node.input]
    first = traced[0] if traced else None
    if node.op_type == "Gather":  # an embedding: one more axis
        by_rows = not any(told.name == "axis" and told.i for told in node.attribute)
        return [*traced[1], -1] if traced[1] is not None and by_rows else None
    if node.op_type in _KEEPING_EITHER:
        return first if first is not None else traced[1]
    if first is None:
        return None
    if node.op_type == "Transpose":
        perm = next((list(told.ints) for told in node.attribute if told.name == "perm"), None)
        return first[::-1] if perm is None else [first[axis] for axis in perm]
    if node.op_type == "MatMul" and first:
        return [*first[:-1], -1]
    return first if node.op_type in _KEEPING else None
