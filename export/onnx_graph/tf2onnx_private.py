"""The private parts of tf2onnx that the export uses, all in one place; tried with tf2onnx 1.17.

`tests/export/test_private_parts.py` names what is missing after an upgrade.
"""

from __future__ import annotations

from typing import Any

import onnx
import tf2onnx
from tf2onnx.optimizer import back_to_back_optimizer

from cellserve.export.onnx_graph.tf2onnx_handlers import HANDLERS, index_from_the_end

# Left in, it drops a cast to fewer digits that is cast back, and the rounding with it.
back_to_back_optimizer._func_map.pop(("Cast",))
# Two rewriters look for `x * (x > c)` and `maximum(c * x, x)`. Their operators differ for NaN and infinity.
tf2onnx.tfonnx.rewrite_thresholded_relu = tf2onnx.tfonnx.rewrite_leakyrelu = lambda graph, nodes: nodes


def convert_graph(graph: Any, inputs: list[str], outputs: list[str], opset: int) -> onnx.ModelProto:
    """Converts a frozen TensorFlow GraphDef, with the project's own handlers."""
    model, _ = tf2onnx.convert.from_graph_def(
        graph,
        input_names=inputs,
        output_names=outputs,
        opset=opset,
        custom_op_handlers=HANDLERS,
        custom_rewriter=[index_from_the_end],
    )
    return model
