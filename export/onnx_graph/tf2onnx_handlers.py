"""ONNX nodes for TensorFlow operations that tf2onnx lacks, or writes so that they are exact only for ordinary numbers.

Each function writes one operation and says what it is or what was wrong with it. `HANDLERS` and `REWRITERS` are what
tf2onnx is given. `tests/export/test_conversions.py` compares every conversion with Keras for special values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from cellserve.export.onnx_graph.tf2onnx_nodes import HANDLERS, Nodes, converts
from cellserve.export.onnx_graph.tf2onnx_private import ArgMax, PoolOp, Select

__all__ = ["HANDLERS", "REWRITERS"]

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)
_INTEGERS = (TensorProto.INT32, TensorProto.INT64)  # the integers that every operator of ONNX Runtime takes
_INT32_MIN = np.iinfo(np.int32).min
# What makes a small absolute error large: after one of these, a number near zero must be right in its own scale.
_AMPLIFIERS = {"Log", "Log1p", "Sqrt", "Rsqrt", "Reciprocal", "Pow", "Xlogy", "Sign", "Atan2"}
_AMPLIFIERS |= {"Equal", "NotEqual", "Greater", "GreaterEqual", "GreaterOrEqual", "Less", "LessEqual", "LessOrEqual"}
_DIVISIONS = {"RealDiv", "Div", "DivNoNan", "Xdivy", "FloorDiv", "FloorMod", "Mod"}
_PRODUCTS = {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Gemm", "Einsum"}
_PRODUCTS |= {"Conv", "Conv1D", "Conv2D", "Conv3D"}


def _feeds_amplifier(graph: Any, tensor: str) -> bool:
    """Whether a tensor reaches a logarithm, a root, a comparison or a divisor without a product with weights between.

    An output may be a state, which the next step reads; of its readers some may have ONNX's names already.
    ONNX Runtime's Sigmoid and Erf are right to about 1e-7, not to seven digits: sigmoid(-20) is 0 instead of 2e-9. That
    is no more than rounding wherever it is added to or multiplied with numbers near 1, and much faster.
    """
    seen, pending = {tensor}, [tensor]
    while pending:
        name = pending.pop()
        if name in graph.outputs:
            pending += [node.output[0] for node in graph.inputs if node.output[0] not in seen]
            seen.update(node.output[0] for node in graph.inputs)
        for node in graph.find_output_consumers(name):
            if node.type in _AMPLIFIERS or (node.type in _DIVISIONS and node.input[1] == name):
                return True
            if node.type not in _PRODUCTS:
                pending += [output for output in node.output if output not in seen]
                seen.update(node.output)
    return False


@converts("Log1p")
def log1p(write: Nodes, x: str) -> str:
    """log(1 + x), accurate near 0 too (Kahan's form, cf. Goldberg 1991, theorem 4)."""
    sum_ = write("Add", x, 1)
    more = write("Sub", sum_, 1)
    curved = write("And", write("Greater", write("Abs", more), 0), write("Less", sum_, math.inf))
    # The last branch keeps the sign of a zero; with `Not` before it ONNX Runtime would make it the first.
    return write("Where", curved, write("Mul", write("Log", sum_), write("Div", x, more)), x)


@converts("Expm1")
def expm1(write: Nodes, x: str) -> str:
    """exp(x) - 1, accurate near 0 too (Kahan)."""
    power = write("Exp", x)
    less_one = write("Sub", power, 1)
    corrected = write("Mul", less_one, write("Div", x, write("Log", power)))
    extreme = write("Or", write("Equal", less_one, -1), write("Equal", power, math.inf))
    curved = write("Where", extreme, less_one, corrected)
    return write("Where", write("Greater", write("Abs", less_one), 0), curved, x)


@converts("Sigmoid")
def sigmoid(write: Nodes, x: str) -> str | None:
    """1 / (1 + exp(-x)) where the digits of small results matter; otherwise ONNX's operator."""
    if not _feeds_amplifier(write.graph, write.node.output[0]):
        return None
    return write("Div", 1, write("Add", write("Exp", write("Neg", x)), 1))


@converts("Erfc")
def erfc(write: Nodes, x: str) -> str:
    """1 - erf(x); where the digits of small results matter, a Chebyshev fit of them (Numerical Recipes, erfcc)."""
    if not _feeds_amplifier(write.graph, write.node.output[0]):
        return write("Sub", 1, write("Erf", x))
    z = write("Abs", x)
    t = write("Div", 1, write("Add", write("Mul", z, 0.5), 1))
    terms = (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196)
    total = write("Mul", t, terms[0])
    for term in (*terms[1:], 1.00002368):
        total = write("Mul", write("Add", total, term), t)
    exponent = write("Sub", write("Add", total, -1.26551223), write("Mul", z, z))
    tail = write("Mul", t, write("Exp", exponent))
    return write("Where", write("Less", x, 0.5), write("Sub", 1, write("Erf", x)), tail)


@converts("Softsign")
def softsign(write: Nodes, x: str) -> str:
    """The quotient x / (1 + |x|); ONNX Runtime multiplies by a reciprocal, which is 0 for the largest numbers."""
    return write("Div", x, write("Add", write("Abs", x), 1))


@converts("Elu", "Selu")
def elu(write: Nodes, x: str) -> str | None:
    """ONNX's operator, which loses the sign of a zero; with that sign, where it may matter."""
    if not _feeds_amplifier(write.graph, write.node.output[0]):
        return None
    return write("Where", write("Greater", write("Abs", x), 0), write(write.node.type, x), x)


@converts("Atan2")
def atan2(write: Nodes, y: str, x: str) -> str:
    """The angle of (x, y), for infinities and signed zeros too."""
    both = write("And", write("IsInf", x), write("IsInf", y))
    diagonal = write("Mul", write("Sign", y), write("Sign", x))
    zeros = write("And", write("Equal", x, 0), write("Equal", y, 0))
    ratio = write("Where", both, diagonal, write("Where", zeros, y, write("Div", y, x)))
    angle = write("Atan", ratio)
    turn = write("Where", write.negative(y), -math.pi, math.pi)
    turned = write("Where", write.negative(x), write("Add", angle, turn), angle)
    # A zero has the sign of y. ONNX Runtime's `Where` keeps the sign of a zero in its last branch only.
    zero = write("Mul", write("Abs", turned), write("Where", write.negative(y), -1, 1))
    return write("Where", write("Greater", write("Abs", turned), 0), turned, zero)


@converts("FloorMod")
def floor_mod(write: Nodes, x: str, y: str) -> str:
    """The remainder with the divisor's sign; tf2onnx's x - floor(x / y) y is wrong for large and negative numbers."""
    if write.type not in _FLOATS:
        return write.cast(write("Mod", *_integers(write, x, y)), write.type)  # it has the divisor's sign
    rest = write("Mod", x, y, fmod=1)
    opposite = write("Xor", write("Less", rest, 0), write("Less", y, 0))
    wrong = write("And", opposite, write("Not", write("Equal", rest, 0)))
    return write("Where", wrong, write("Add", rest, y), rest)


@converts("FloorDiv")
def floor_div(write: Nodes, x: str, y: str) -> str:
    """The quotient rounded down; tf2onnx rounds that of integers towards zero."""
    if write.type not in _FLOATS:
        zero = np.array(0)
        dividend, divisor = _integers(write, x, y)
        opposite = write("Xor", write("Less", dividend, zero), write("Less", divisor, zero))
        exact = write("Equal", write("Mod", dividend, divisor), zero)
        down = write.cast(write("And", opposite, write("Not", exact)), TensorProto.INT64)
        return write.cast(write("Sub", write("Div", dividend, divisor), down), write.type)
    return write("Floor", write("Div", x, y))


def _integers(write: Nodes, x: str, y: str) -> tuple[str, str]:
    """Dividend and divisor as int64, with both signs turned where the divisor is -1.

    The smallest integer divided by -1 raises a signal that ends the process. Division by 0 is an error in ONNX Runtime,
    as in TensorFlow.
    """
    dividend, divisor = write.cast(x, TensorProto.INT64), write.cast(y, TensorProto.INT64)
    if write.type == TensorProto.INT64:
        turned = write("Equal", divisor, np.array(-1))
        dividend = write("Where", turned, write("Neg", dividend), dividend)
        divisor = write("Where", turned, np.array(1), divisor)
    return dividend, divisor


@converts("Greater", "GreaterEqual", "Less", "LessEqual")
def compare(write: Nodes, x: str, y: str) -> str:
    """A comparison; tf2onnx casts integers to float32, in which those beyond 2**24 are equal to their neighbours."""
    operator = {"GreaterEqual": "GreaterOrEqual", "LessEqual": "LessOrEqual"}.get(write.node.type, write.node.type)
    if write.type not in (TensorProto.FLOAT, TensorProto.DOUBLE):
        # Integers are cast whatever type they have: the counter of a loop is int64, and tf2onnx takes it for int32.
        to = TensorProto.FLOAT if write.type in _FLOATS else TensorProto.INT64
        x, y = write.cast(x, to), write.cast(y, to)
    return write(operator, x, y)


@converts("Max", "Min")
def reduce_extreme(write: Nodes, x: str, axes: str) -> str:
    """The largest or smallest entry; ONNX Runtime's operators pass over NaN, TensorFlow's do not."""
    places = np.atleast_1d(write.value(1)).astype(np.int64)
    keep = int(bool(write.node.get_attr_value("keep_dims", 0)))
    of = {"keepdims": keep, "noop_with_empty_axes": 1}
    operator = "ReduceMax" if write.node.type == "Max" else "ReduceMin"
    if write.type not in (*_FLOATS, *_INTEGERS):
        return write.cast(write(operator, write.cast(x, TensorProto.INT64), places, **of), write.type)
    extreme = write(operator, x, places, **of)
    if write.type in _INTEGERS:
        return extreme
    missing = write("ReduceMax", write.cast(write("IsNaN", x), write.type), places, **of)
    return write("Where", write("Greater", missing, 0), math.nan, extreme)


@converts("TopKV2")
def top_k(write: Nodes, x: str, k: str) -> tuple[str, str]:
    """The largest entries and their places; tf2onnx compares integers as float32."""
    of = x if write.type in (TensorProto.FLOAT, TensorProto.DOUBLE, *_INTEGERS) else write.cast(x, TensorProto.INT64)
    count = write("Reshape", write.cast(k, TensorProto.INT64), np.array([1]))
    values, places = write.graph.make_node("TopK", [of, count], output_count=2).output
    return write.cast(values, write.type), write.cast(places, write.node.output_dtypes[1])


@converts("OneHot")
def one_hot(write: Nodes, indices: str, depth: str, on: str, off: str) -> str:
    """One-hot rows; ONNX's operator counts negative indices from the end, TensorFlow has no entry for them."""
    axis = write.node.get_attr_value("axis", -1)
    rank = len(write.graph.get_shape(indices))
    axis = rank if axis == -1 else axis
    # The depth may be computed, from a shape say.
    counted = write("Range", np.array(0), write.cast(depth, TensorProto.INT64), np.array(1))
    entries = write("Reshape", counted, np.array([-1, *[1] * (rank - axis)]))
    column = write("Unsqueeze", write.cast(indices, TensorProto.INT64), np.array([axis], np.int64))
    hit = write("Equal", column, entries)
    if write.value(2) == 1 and write.value(3) == 0:
        return write.cast(hit, write.graph.get_dtype(on))
    return write("Where", hit, on, off)


@converts("Bitcast")
def bitcast(write: Nodes, x: str) -> str | None:
    """The sign bit of a float, which `signbit` and `argmax` of Keras ask for; other bits have no operator in ONNX."""
    readers = write.graph.find_output_consumers(write.node.output[0])
    masks = [reader.inputs[1].get_tensor_value() for reader in readers if reader.type == "BitwiseAnd"]
    if write.type != TensorProto.FLOAT or len(masks) < len(readers) or any(mask != _INT32_MIN for mask in masks):
        return None
    return write("Mul", write.cast(write.negative(x), TensorProto.INT32), np.array(_INT32_MIN, np.int32))


@converts("Bucketize")
def bucketize(write: Nodes, x: str) -> str:
    """The number of boundaries that are not above each entry (NaN: all of them)."""
    boundaries = np.array(write.node.get_attr_value("boundaries"), helper.tensor_dtype_to_np_dtype(write.type))
    return _count(write, write("Not", write("Less", write("Unsqueeze", x, np.array([-1])), boundaries)))


@converts("LowerBound", "UpperBound")
def search_sorted(write: Nodes, ordered: str, values: str) -> str:
    """The places at which values would be inserted into ordered rows: `[rows, n], [rows, m] -> [rows, m]`."""
    row, column = write("Unsqueeze", ordered, np.array([1])), write("Unsqueeze", values, np.array([2]))
    if write.node.type == "LowerBound":
        return _count(write, write("Less", row, column))
    return _count(write, write("Not", write("Less", column, row)))


def _count(write: Nodes, truths: str) -> str:
    """How many entries of the last axis are true."""
    ones = write.cast(truths, TensorProto.INT32)
    return write.cast(write("ReduceSum", ones, np.array([-1]), keepdims=0), write.graph.get_dtype(write.node.output[0]))


@converts("Cumprod")
def cumprod(write: Nodes, x: str, axis: str) -> str | None:
    """Products of the entries up to each; of an axis of known size."""
    shape = write.graph.get_shape(x)
    place = int(write.value(1)) % len(shape)
    size = shape[place]
    if size < 0:
        return None
    steps = np.arange(size)
    covered = steps[None, :] < steps[:, None] if write.node.get_attr_value("exclusive") else steps <= steps[:, None]
    if write.node.get_attr_value("reverse"):
        covered = covered[::-1, ::-1]
    order = [*(at for at in range(len(shape)) if at != place), place]
    rows = write("Unsqueeze", write("Transpose", x, perm=order), np.array([-2]))
    products = write("ReduceProd", write("Where", covered, rows, 1), np.array([-1]), keepdims=0)
    return write("Transpose", products, perm=np.argsort(order).tolist())


@converts("MatrixBandPart")
def matrix_band_part(write: Nodes, x: str, lower: str, upper: str) -> str:
    """A matrix with zeros outside a band; tf2onnx multiplies by a mask, and 0 times infinity is not a number."""
    below, above = int(write.value(1)), int(write.value(2))
    taken = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL)  # by ONNX Runtime's Trilu
    other = TensorProto.FLOAT if write.type in _FLOATS else TensorProto.INT64
    band = x if write.type in taken else write.cast(x, other)
    if above >= 0:
        band = write("Trilu", band, np.array(above), upper=0)
    if below >= 0:
        band = write("Trilu", band, np.array(-below), upper=1)
    return band if write.type in taken else write.cast(band, write.type)


@converts("BroadcastArgs")
def broadcast_args(write: Nodes, first: str, second: str) -> str:
    """The shape of two shapes broadcast."""
    ranks = [write.graph.get_shape(shape)[0] for shape in (first, second)]
    padded = [
        write("Concat", np.ones(max(ranks) - rank, helper.tensor_dtype_to_np_dtype(write.type)), shape, axis=0)
        for shape, rank in zip((first, second), ranks, strict=True)
    ]
    return write("Where", write("Equal", padded[0], 1), padded[1], padded[0])


@converts("XlaDynamicUpdateSlice")
def slice_update(write: Nodes, x: str, update: str, starts: str) -> str | None:
    """A tensor with a block replaced (`keras.ops.slice_update`), at a constant place."""
    whole, part = (write.graph.get_shape(name) for name in (x, update))
    axes = [axis for axis, (size, width) in enumerate(zip(whole, part, strict=True)) if size != width]
    if not write.node.inputs[2].is_const() or any(min(whole[axis], part[axis]) < 0 for axis in axes):
        return None
    first = np.clip(np.atleast_1d(write.value(2))[axes], 0, [whole[axis] - part[axis] for axis in axes])

    def replace(target: str, depth: int) -> str:
        if depth == len(axes):
            return update
        axis, start = axes[depth], int(first[depth])
        edges = [0, start, start + part[axis], whole[axis]]
        blocks = [
            write("Slice", target, np.array([low]), np.array([high]), np.array([axis]))
            for low, high in itertools.pairwise(edges)
        ]
        return write("Concat", blocks[0], replace(blocks[1], depth + 1), blocks[2], axis=axis)

    return replace(x, 0)


def select(graph: Any, node: Any, *_: Any) -> None:
    """Writes TensorFlow's Select as `Where`.

    By itself tf2onnx writes `Where` only if it sees an infinity or NaN among the constants, and otherwise
    `condition * x + (1 - condition) * y`. That is NaN wherever the branch not taken is not finite, which is what a
    guard (`where(isfinite(1 / x), 1 / x, 0)`) is for. The products are right for integers and booleans, of which ONNX
    Runtime's `Where` supports only some types.
    """
    if graph.get_dtype(node.output[0]) in _FLOATS:
        node.set_attr("handles_nan", True)
    Select.version_9(graph, node)


def max_pool(graph: Any, node: Any, *_: Any) -> None:
    """Writes MaxPool such that it passes over NaN and knows no minus infinity, as TensorFlow's does on a CPU."""
    write, x, operation = Nodes(graph, node), node.input[0], node.type
    lowest = float(np.finfo(np.float32).min)
    graph.replace_input(node, x, write("Where", write("Greater", x, lowest), x, lowest), 0)
    node.type = "MaxPool"
    PoolOp.version_11(graph, node, tf_op=operation)


def arg_extreme(graph: Any, node: Any, *_: Any) -> None:
    """Writes ArgMax and ArgMin such that a leading NaN is passed over like one further on, as TensorFlow's do."""
    write, x = Nodes(graph, node), node.input[0]
    if write.type in _FLOATS:
        worst = -math.inf if node.type == "ArgMax" else math.inf
        graph.replace_input(node, x, write("Where", write("IsNaN", x), worst, x), 0)
    elif write.type == TensorProto.BOOL:
        graph.replace_input(node, x, write.cast(x, TensorProto.INT32), 0)
    ArgMax.version_12(graph, node)


HANDLERS.update(Select=(select, []), SelectV2=(select, []), ArgMax=(arg_extreme, []), ArgMin=(arg_extreme, []))
HANDLERS.update(dict.fromkeys(("MaxPool", "MaxPoolV2", "MaxPool3D"), (max_pool, [])))


def index_from_the_end(graph: Any, nodes: list[Any]) -> list[Any]:
    """Rewriter that leaves negative indices to ONNX's Gather, which counts them from the end as `keras.ops.take` does.

    Keras writes `where(i < 0, i + size, i)` for them. Gather then would count from the end what that leaves negative;
    TensorFlow refuses it.
    """
    for node in nodes:
        if node.type != "GatherV2" or node.inputs[1].type != "SelectV2" or not node.inputs[2].is_const():
            continue
        chosen = node.inputs[1]
        below, moved, index = chosen.inputs[0], chosen.inputs[1], chosen.input[2]
        size = graph.get_shape(node.input[0])[node.inputs[2].get_tensor_value()]
        of_index = below.type == "Less" and moved.type == "AddV2" and below.input[0] == moved.input[0] == index
        if of_index and _constant(below.inputs[1]) == 0 and _constant(moved.inputs[1]) == size:
            graph.replace_input(node, node.input[1], index, 1)
    return nodes


def _constant(node: Any) -> Any:
    return node.get_tensor_value() if node.is_const() else None


REWRITERS: list[Callable[[Any, list[Any]], list[Any]]] = [index_from_the_end]
