"""Networks in float64: exact, or with every result rounded to float32's numbers at random.

The latter is Monte Carlo arithmetic (D. S. Parker, UCLA CSD-970002, 1997). Its runs differ by what other kernels, other
orders of sums and fused operations may make of a network in float32. A result that float32 has exactly stays what it
is, so what special numbers decide, no rounding does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from cellserve.export.keras_model.keras_private import casts_to_double
from cellserve.export.keras_model.load import computing_in
from cellserve.export.onnx_graph.tensorflow_private import add_op_callback, remove_op_callback

ERROR = 2.0**-22  # relative: that of ONNX Runtime's tanh, the largest of its functions
SIGMOID_ERROR = 2.0**-23  # absolute: sigmoid(-20) is 0 there, not 2e-9
_RANGES = {"Sigmoid": (0, 1), "Tanh": (-1, 1), "Sin": (-1, 1), "Cos": (-1, 1), "Softmax": (0, 1), "Erf": (-1, 1)}
_SUMS = {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "Conv2D", "Conv3D", "Sum", "Mean"}
_SUMS |= {"DepthwiseConv2dNative", "Cumsum", "AvgPool"}
_UNSIGNED = {*_SUMS, "Max", "Min", "Maximum", "Minimum", "Relu", "Relu6"}  # TensorFlow's zeros: by an entry's place
_CONTROL_FLOW = {"While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase"}  # kept as they are


@contextmanager
def in_double(rounded: bool = False) -> Iterator[None]:
    """Makes Keras compute in float64, also where a layer's own code casts to float32.

    Args:
        rounded: Whether the results of all operations that are put into a graph meanwhile are rounded at random.
    """
    if rounded:
        add_op_callback(_replaced)
    try:
        with computing_in("float64"), casts_to_double():
            yield
    finally:
        if rounded:
            remove_op_callback(_replaced)


def _replaced(
    operation: str, inputs: Any, attributes: Any, outputs: Sequence[Any], op_name: Any, graph: Any = None
) -> list[Any] | None:
    """The outputs of an operation that has been put into a graph, rounded at random."""
    if graph is None or operation in _CONTROL_FLOW:
        return None
    return [_rounded(operation, y) if y.dtype == tf.float64 else y for y in outputs]


def _rounded(operation: str, y: Any) -> Any:
    exact, scale = _nearest(y) == y, tf.abs(y)
    if operation in _SUMS:
        terms = [tf.abs(x) if x.dtype == tf.float64 else x for x in y.op.inputs]
        attributes = dict(y.op.node_def.attr)
        scale = y.graph.create_op(operation, terms, [y.dtype], attrs=attributes).outputs[0]
        exact &= _nearest(scale) == scale
    noise = tf.random.uniform(tf.shape(y), -1, 1, y.dtype, seed=len(y.graph.get_operations()))
    changed = _nearest(y + noise * (ERROR * scale + (SIGMOID_ERROR if operation == "Sigmoid" else 0)))
    if operation in _RANGES:
        changed = tf.clip_by_value(changed, *_RANGES[operation])
    result = tf.where(exact, y, changed)
    if operation in _UNSIGNED:
        zero = tf.zeros_like(y)
        result = tf.where(tf.equal(y, 0), tf.where(noise < 0, -zero, zero), result)
    return tf.ensure_shape(result, y.shape)


def _nearest(y: Any) -> Any:
    """The nearest numbers that float32 has, in float64."""
    return tf.cast(tf.cast(y, tf.float32), tf.float64)
