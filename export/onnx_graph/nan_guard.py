"""Keeps NaN alive through ONNX Runtime's recurrent operators, whose kernels make finite numbers of it.

They add the bias with a clip (`clip_add_bias` in rnn_helpers.cc) that turns NaN into the largest float32, which opens a
gate. Infinities come out right. NaN in a gate comes from NaN in the input, or from a product with the kernel in which
infinities of both signs meet; neither can happen while the input's numbers are of ordinary size, which one reduction
tells.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from cellserve.export.onnx_graph.builder import GraphBuilder

_LARGEST_SUM_OF_SQUARES = 1e30  # no product of smaller numbers with a kernel overflows float32
_BOUNDED = frozenset(("Erf", "GRU", "HardSigmoid", "LSTM", "OneHot", "Sigmoid", "Softmax", "Softsign", "Tanh"))
_MOVES_ONLY = frozenset(
    ("Concat", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze")
)


def is_bounded(graph: GraphBuilder, name: str) -> bool:
    """Whether a tensor's numbers are finite and of ordinary size, whatever is sent, by the operators that write it."""
    if name in graph.initializers:
        return True
    producer = next((node for node in graph.nodes if name in node.output), None)
    if producer is None:
        return False
    if producer.op_type == "Gather":
        return is_bounded(graph, producer.input[0])
    if producer.op_type in _MOVES_ONLY:
        sources = producer.input if producer.op_type == "Concat" else producer.input[:1]
        return all(is_bounded(graph, source) for source in sources)
    return producer.op_type in _BOUNDED


def nan_guard(graph: GraphBuilder, x: str, lengths: str, kernel: str) -> str:
    """Writes what to add to a recurrent operator's final state so that it is NaN where a gate has been NaN.

    Args:
        graph: The graph to write to.
        x: Name of the operator's input, `[time, batch, features]`.
        lengths: Name of its lengths, `[batch]`, or "".
        kernel: Name of its input kernel, `[1, gates * units, features]`.

    Returns:
        The name of a tensor that broadcasts to `[1, batch, units]`: NaN, or a zero that changes no bit.
    """
    looked = GraphBuilder(f"{graph.prefix}nan_guard_{len(graph.nodes)}.else.")
    nan = _nan_steps(looked, x, kernel)
    if lengths:
        time = looked.node("Squeeze", looked.node("Slice", looked.node("Shape", x), *_first(looked)), _axes(looked, 0))
        bounds = (looked.constant(np.array(0)), time, looked.constant(np.array(1)))
        steps = looked.node("Unsqueeze", looked.node("Range", *bounds), _axes(looked, 1))
        valid = looked.node("Less", steps, looked.node("Cast", lengths, to=TensorProto.INT64))
        nan = looked.node("Mul", nan, looked.node("Cast", valid, to=TensorProto.FLOAT))
    nan = looked.node("Unsqueeze", looked.node("ReduceMax", nan, _axes(looked, 0), keepdims=1), _axes(looked, 2))
    return _unless_ordinary(graph, x, looked, nan)


def nan_guard_over_time(graph: GraphBuilder, x: str, kernel: str) -> str:
    """Writes what to add to a recurrent operator's output: NaN from the first step on at which a gate has been NaN.

    For a graph that returns no states, in which it would show. Arguments as for `nan_guard`.

    Returns:
        The name of a tensor that broadcasts to `[time, 1, batch, units]`: NaN, or a zero that changes no bit.
    """
    looked = GraphBuilder(f"{graph.prefix}nan_guard_{len(graph.nodes)}.else.")
    so_far = looked.node("CumSum", _nan_steps(looked, x, kernel), looked.constant(np.array(0)))
    return _unless_ordinary(graph, x, looked, looked.node("Unsqueeze", so_far, looked.constant(np.array([1, 3]))))


def _nan_steps(graph: GraphBuilder, x: str, kernel: str) -> str:
    """The steps at which a gate is NaN, `[time, batch]`: 1, elsewhere 0."""
    gates = graph.node("MatMul", x, graph.node("Transpose", graph.node("Squeeze", kernel, _axes(graph, 0))))
    nan = graph.node("Cast", graph.node("IsNaN", gates), to=TensorProto.FLOAT)
    return str(graph.node("ReduceMax", nan, _axes(graph, 2), keepdims=0))


def _unless_ordinary(graph: GraphBuilder, x: str, looked: GraphBuilder, nan: str) -> str:
    """NaN where `nan`, of the graph `looked`, is not 0; a zero for all if the input's numbers are of ordinary size."""
    total = graph.node("ReduceSumSquare", x, keepdims=0)
    ordinary = graph.node("Less", total, graph.constant(np.array(_LARGEST_SUM_OF_SQUARES, np.float32)))  # false of NaN
    nothing = GraphBuilder(looked.prefix.removesuffix("else.") + "then.")
    zero = nothing.node("Identity", _number(nothing, -0.0))
    values = _number(looked, np.nan), _number(looked, -0.0)
    poison = looked.node("Where", looked.node("Cast", nan, to=TensorProto.BOOL), *values)
    branches = {"then_branch": _branch(nothing, zero), "else_branch": _branch(looked, poison)}
    return str(graph.node("If", ordinary, **branches))


def _branch(graph: GraphBuilder, output: str) -> onnx.GraphProto:
    return graph.graph(graph.prefix, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])


def _axes(graph: GraphBuilder, axis: int) -> str:
    return graph.constant(np.array([axis]))


def _number(graph: GraphBuilder, number: float) -> str:
    return graph.constant(np.full((1, 1, 1), number, np.float32))


def _first(graph: GraphBuilder) -> tuple[str, str]:
    return graph.constant(np.array([0])), graph.constant(np.array([1]))
