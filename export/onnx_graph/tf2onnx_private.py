"""The private parts of tf2onnx that the export uses, all in one place; tried with tf2onnx 1.17.

`tests/export/test_private_parts.py` names what is missing after an upgrade.
"""

from __future__ import annotations

from typing import Any

import onnx
import tf2onnx
from tf2onnx.onnx_opset.controlflow import Select

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)


def _write_select(graph: Any, node: Any, *_: Any) -> None:
    """Writes TensorFlow's Select as `Where`, as one of tf2onnx's operator handlers.

    By itself tf2onnx writes `Where` only if it sees an infinity or NaN among the constants, and otherwise
    `condition * x + (1 - condition) * y`. That is NaN wherever the branch not taken is not finite, which is what a
    guard (`where(isfinite(1 / x), 1 / x, 0)`) is for. The products are right for integers and booleans, of which ONNX
    Runtime's `Where` supports only some types.
    """
    if graph.get_dtype(node.output[0]) in _FLOATS:
        node.set_attr("handles_nan", True)
    Select.version_9(graph, node)


def convert_graph(graph: Any, inputs: list[str], outputs: list[str], opset: int) -> onnx.ModelProto:
    """Converts a frozen TensorFlow GraphDef; selects of floats become `Where`."""
    handlers: dict[str, tuple[Any, list[Any]]] = {"Select": (_write_select, []), "SelectV2": (_write_select, [])}
    model, _ = tf2onnx.convert.from_graph_def(
        graph, input_names=inputs, output_names=outputs, opset=opset, custom_op_handlers=handlers
    )
    return model
