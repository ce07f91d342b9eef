"""Monte Carlo arithmetic: a network in float64 whose every result is rounded to float32's numbers at random.

Its runs differ by what other kernels, other orders of sums and fused operations may make of a network in float32 (D. S.
Parker, Monte Carlo Arithmetic, UCLA CSD-970002, 1997). A result that float32 has exactly stays what it is, so what
special numbers decide, no rounding does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from cellserve.export.onnx_graph.tensorflow_private import add_op_callback, remove_op_callback

ERROR = 2.0**-22  # relative: that of ONNX Runtime's tanh, the largest of its functions
GATE_ERROR = 2.0**-23  # of its sigmoid, absolute: sigmoid(-20) is 0, not 2e-9
_SUMS = {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "Conv2D", "Conv3D", "Sum", "Mean"}
_SUMS |= {"DepthwiseConv2dNative", "Cumsum", "AvgPool"}
_RANGES = {"Sigmoid": (0, 1), "Tanh": (-1, 1), "Sin": (-1, 1), "Cos": (-1, 1), "Softmax": (0, 1), "Erf": (-1, 1)}
# In TensorFlow the sign of their zeros depends on an entry's place.
_UNSIGNED = {*_SUMS, "Max", "Min", "Maximum", "Minimum", "Relu", "Relu6"}
_KEPT = {"While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase", "PartitionedCall"}
_KEPT |= {"StatefulPartitionedCall", "Placeholder", "ReadVariableOp", "TensorListGetItem", "TensorListStack"}


@contextmanager
def random_rounding() -> Iterator[None]:
    """Rounds the results of all operations of float64 that are put into graphs meanwhile."""
    add_op_callback(_rounded)
    try:
        yield
    finally:
        remove_op_callback(_rounded)


def _rounded(
    operation: str,
    inputs: Sequence[Any],
    attributes: Any,
    outputs: Sequence[Any],
    op_name: Any = None,
    graph: Any = None,
) -> list[Any] | None:
    if graph is None or operation in _KEPT:
        return None
    return [_round(operation, y, graph) if y.dtype == tf.float64 else y for y in outputs]


def _round(operation: str, y: Any, graph: Any) -> Any:
    rounded = _nearest(y)
    if operation == "Const":
        return rounded
    exact, scale = rounded == y, tf.abs(y)
    if operation in _SUMS:
        node = y.op
        terms = [tf.abs(x) if x.dtype == tf.float64 else x for x in node.inputs]
        scale = graph.create_op(operation, terms, [y.dtype], attrs=dict(node.node_def.attr)).outputs[0]
        exact &= _nearest(scale) == scale
    noise = tf.random.uniform(tf.shape(y), -1, 1, y.dtype, seed=len(graph.get_operations()))
    error = ERROR * scale + (GATE_ERROR if operation == "Sigmoid" else 0)
    changed = _nearest(y + noise * error)
    if operation in _RANGES:
        changed = tf.clip_by_value(changed, *_RANGES[operation])
    changed = tf.where(exact, y, changed)
    if operation in _UNSIGNED:
        changed = tf.where(tf.equal(y, 0), tf.where(noise < 0, -tf.zeros_like(y), tf.zeros_like(y)), changed)
    return tf.ensure_shape(changed, y.shape)


def _nearest(y: Any) -> Any:
    """The nearest number that float32 has, in float64."""
    return tf.cast(tf.cast(y, tf.float32), tf.float64)
