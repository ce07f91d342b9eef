"""Rewrites a float32 model in lower precision for ONNX Runtime: int8 weights or products, float16 weights.

No scheme derives a scale from several rows, as ONNX Runtime's own dynamic quantization does (`DynamicQuantizeLSTM`):
one session's numbers would then change another's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cellserve.export.onnx_graph.builder import GraphBuilder, all_graphs

Array = NDArray[Any]
Ranges = Mapping[str, float]  # weight digest -> largest absolute value that the weight was multiplied by
Change = Callable[[onnx.ModelProto, Ranges], bool]  # changes a model in place; False if nothing applied

# (operator, index of the weight among its inputs) -> the axis along which each entry gets its own scale.
_CHANNELS = {
    ("MatMul", 1): -1,
    ("Gemm", 1): -1,
    ("Gather", 0): 0,
    ("Conv", 1): 0,
    **{(operator, place): 1 for operator in ("LSTM", "GRU", "RNN") for place in (1, 2)},
}
_MIN_ENTRIES = 32  # smaller weights stay float32: their scales would take what is saved
# Largest int8 weight in a product with uint8 numbers: with 8 bits, sums of two products overflow 16 bits on processors
# without VNNI (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
_SEVEN_BITS = 64


class Scheme(NamedTuple):
    """A way to rewrite a model in lower precision."""

    name: str
    change: Change
    calibrated: bool = False  # whether it needs calibration ranges

    def rewrite(self, model: onnx.ModelProto, ranges: Ranges) -> onnx.ModelProto | None:
        """Returns a rewritten copy of the model, or None if the scheme applies to nothing in it."""
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        if not self.change(copy, ranges):
            return None
        used = {name for graph in all_graphs(copy.graph) for node in graph.node for name in node.input}
        for graph in all_graphs(copy.graph):
            kept = [tensor for tensor in graph.initializer if tensor.name in used]
            del graph.initializer[:]
            graph.initializer.extend(kept)
        return copy


def digest(weight: Array) -> str:
    """Identifies a weight by its content, as its name differs between graphs."""
    return hashlib.sha256(repr(weight.shape).encode() + weight.tobytes()).hexdigest()


def products(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, Array]]:
    """Yields the nodes that multiply by a constant matrix, with that matrix `[in, out]`."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants:
            attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            weight = numpy_helper.to_array(constants[node.input[1]])
            plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1 and not attributes.get("transA")
            if plain and weight.ndim == 2 and weight.dtype == np.float32 and weight.size >= _MIN_ENTRIES:
                yield node, weight.T if attributes.get("transB") else weight


# Weights stored in lower precision. ONNX Runtime folds `Cast` and `Mul` of constants when it opens the model and then
# runs a float32 model with rounded weights. A `DequantizeLinear` would run at every step, before an unpacked product.


def _store_weights(store: Callable[[GraphBuilder, Array, int], str], model: onnx.ModelProto, ranges: Ranges) -> bool:
    """Replaces every large enough weight by what `store` writes for it."""
    changed = False
    for graph in all_graphs(model.graph):
        builder = GraphBuilder(f"stored/{graph.name}/")
        axes = {
            name: _CHANNELS[node.op_type, place]
            for node in graph.node
            for place, name in enumerate(node.input)
            if (node.op_type, place) in _CHANNELS
        }
        for tensor in graph.initializer:
            weight = numpy_helper.to_array(tensor)
            if tensor.name in axes and weight.dtype == np.float32 and weight.ndim > 1 and weight.size >= _MIN_ENTRIES:
                stored = store(builder, weight, axes[tensor.name])
                builder.nodes.append(helper.make_node("Identity", [stored], [tensor.name]))
            else:
                builder.initializers[tensor.name] = tensor
        changed |= bool(builder.nodes)
        _replace(graph, [*builder.nodes, *graph.node], builder)
    return changed


def _as_int8(builder: GraphBuilder, weight: Array, axis: int) -> str:
    narrow, scale = _quantized(weight, axis)
    return str(builder.node("Mul", _float(builder, builder.constant(narrow)), builder.constant(scale)))


def _as_float16(builder: GraphBuilder, weight: Array, axis: int) -> str:
    return _float(builder, builder.constant(weight.astype(np.float16)))


def _quantized(weight: Array, axis: int, most: int = 127) -> tuple[NDArray[np.int8], Array]:
    """Returns int8 entries and the scale of each channel; symmetric, so that zero stays zero."""
    others = tuple(place for place in range(weight.ndim) if place != axis % weight.ndim)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    scale = (np.where(largest == 0, 1, largest) / most).astype(np.float32)
    return np.clip(np.rint(weight / scale), -most, most).astype(np.int8), scale


# Products in int8: sums of integers are exact, so their order changes no bit.


def _int8_products(model: onnx.ModelProto, ranges: Ranges, by_row: bool) -> bool:
    """Computes products in int8; inputs are scaled by their calibrated range, or each row by its own largest entry."""
    changed = False
    for graph in all_graphs(model.graph):
        builder = GraphBuilder(f"int8/{graph.name}/")
        builder.initializers = {tensor.name: tensor for tensor in graph.initializer}
        weights = {node.output[0]: weight for node, weight in products(graph)}
        for node in graph.node:
            weight = weights.get(node.output[0])
            if weight is None or not (by_row or digest(weight) in ranges):
                builder.nodes.append(node)
                continue
            result = _int8_product(builder, node.input[0], weight, None if by_row else ranges[digest(weight)])
            if len(node.input) > 2:  # a Gemm's bias
                result = builder.node("Add", result, node.input[2])
            builder.nodes.append(helper.make_node("Identity", [result], [node.output[0]]))
            changed = True
        _replace(graph, builder.nodes, builder)
    if changed:
        _store_weights(_as_int8, model, ranges)  # the remaining weights: of recurrent operators and embedding tables
    return changed


def _int8_product(builder: GraphBuilder, x: str, weight: Array, largest: float | None) -> str:
    narrow, scale = _quantized(weight, -1, _SEVEN_BITS)
    zero = _scalar(builder, np.array(128, np.uint8))
    if largest is None:
        row = builder.node("ReduceMax", builder.node("Abs", x), builder.constant(np.array([-1])))
        tiny = _scalar(builder, np.array(1e-30, np.float32))  # avoids dividing a row of zeros by zero
        row = builder.node("Mul", builder.node("Max", row, tiny), _scalar(builder, np.array(1 / 127, np.float32)))
        rounded = builder.node("Round", builder.node("Div", x, row))
        shifted = builder.node("Add", rounded, _scalar(builder, np.array(128, np.float32)))
        numbers = builder.node("Cast", shifted, to=TensorProto.UINT8)
        sums = _float(builder, builder.node("MatMulInteger", numbers, builder.constant(narrow), zero))
        return str(builder.node("Mul", builder.node("Mul", sums, builder.constant(scale[0])), row))
    x_scale = np.array((largest or 1.0) / 127, np.float32)
    numbers = builder.node("QuantizeLinear", x, _scalar(builder, x_scale), zero)
    sums = _float(builder, builder.node("MatMulInteger", numbers, builder.constant(narrow), zero))
    return str(builder.node("Mul", sums, builder.constant(scale[0] * x_scale)))


def _scalar(builder: GraphBuilder, value: Array) -> str:
    """Adds a constant without axes: a scale or zero point with one axis would apply per channel."""
    name = f"{builder.prefix}scalar_{value.dtype}_{value}"
    builder.initializers[name] = numpy_helper.from_array(value, name)
    return name


def _float(builder: GraphBuilder, tensor: str) -> str:
    return str(builder.node("Cast", tensor, to=TensorProto.FLOAT))


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], builder: GraphBuilder) -> None:
    nodes, constants = list(nodes), list(builder.initializers.values())
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


SCHEMES: Mapping[Literal["int8", "float16"], tuple[Scheme, ...]] = {
    "int8": (
        Scheme("int8 weights", partial(_store_weights, _as_int8)),
        Scheme("int8 products, calibrated", partial(_int8_products, by_row=False), calibrated=True),
        Scheme("int8 products, scaled by row", partial(_int8_products, by_row=True)),
    ),
    "float16": (Scheme("float16 weights", partial(_store_weights, _as_float16)),),
}
