"""The private parts of tf2onnx that the export uses, all in one place; tried with tf2onnx 1.17.

`tests/export/test_private_parts.py` names what is missing after an upgrade.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import tf2onnx
from tf2onnx.onnx_opset.controlflow import Select
from tf2onnx.onnx_opset.nn import PoolOp
from tf2onnx.onnx_opset.reduction import ArgMax
from tf2onnx.optimizer import back_to_back_optimizer
from tf2onnx.utils import make_name

__all__ = ["ArgMax", "PoolOp", "Select", "convert_graph", "make_name"]

# Left in, it drops a cast to fewer digits that is cast back, and the rounding with it.
back_to_back_optimizer._func_map.pop(("Cast",))
# Two rewriters look for `x * (x > c)` and `maximum(c * x, x)`. Their operators differ for NaN and infinity.
tf2onnx.tfonnx.rewrite_thresholded_relu = tf2onnx.tfonnx.rewrite_leakyrelu = lambda graph, nodes: nodes


def _optimize(graph: Any, catch_errors: bool = True, optimizers: Any = None) -> Any:
    """Optimises a graph as tf2onnx does, but copies it once, not before each of its dozen optimisers."""
    untouched = copy.deepcopy(graph)
    try:
        return _optimize_graph(graph, False, optimizers)
    except Exception:  # of one optimiser, without which tf2onnx goes on
        return _optimize_graph(untouched, True, optimizers)


_optimize_graph = tf2onnx.optimizer.optimize_graph
tf2onnx.optimizer.optimize_graph = _optimize


def convert_graph(
    graph: Any,
    inputs: list[str],
    outputs: list[str],
    opset: int,
    handlers: Mapping[str, tuple[Callable[..., None], list[Any]]],
    rewriters: list[Callable[[Any, list[Any]], list[Any]]],
) -> onnx.ModelProto:
    """Converts a frozen TensorFlow GraphDef.

    Args:
        graph: The GraphDef.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        opset: ONNX's opset.
        handlers: Own handlers by TensorFlow's operation, each with its arguments.
        rewriters: Functions that change the graph before, given tf2onnx's graph and its nodes.
    """
    model, _ = tf2onnx.convert.from_graph_def(
        graph,
        input_names=inputs,
        output_names=outputs,
        opset=opset,
        custom_op_handlers=dict(handlers),
        custom_rewriter=rewriters,
    )
    return model
