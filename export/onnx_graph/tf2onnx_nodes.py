"""Writes ONNX nodes in place of one TensorFlow node, and registers what does so with tf2onnx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import helper

from cellserve.export.onnx_graph.tf2onnx_private import make_name

Handler = Callable[..., None]  # (tf2onnx's graph, node, name, arguments)
HANDLERS: dict[str, tuple[Handler, list[Any]]] = {}


class Nodes:
    """Writes ONNX nodes in place of one TensorFlow node.

    Args:
        graph: tf2onnx's graph.
        node: The TensorFlow node.
    """

    def __init__(self, graph: Any, node: Any) -> None:
        self.graph, self.node = graph, node
        self.type = graph.get_dtype(node.input[0])

    def __call__(self, operator: str, *inputs: str | float | np.ndarray, **attributes: Any) -> str:
        """Adds a node; returns the name of its output. Plain numbers become constants of the first input's type."""
        names = [operand if isinstance(operand, str) else self._constant(operand) for operand in inputs]
        return str(self.graph.make_node(operator, names, attr=attributes).output[0])

    def _constant(self, value: float | np.ndarray) -> str:
        if not isinstance(value, np.ndarray):
            value = np.array(value, helper.tensor_dtype_to_np_dtype(self.type))
        return str(self.graph.make_const(make_name("constant"), value).output[0])

    def cast(self, tensor: str, to: int) -> str:
        """Returns the tensor in another type."""
        return self("Cast", tensor, to=to)

    def negative(self, x: str) -> str:
        """Whether numbers have a minus sign, -0.0 included; false for NaN."""
        return self("Less", self("Where", self("Equal", x, 0), self("Div", 1, x), x), 0)

    def value(self, place: int) -> Any:
        """The value of a constant input.

        Raises:
            ValueError: The input is computed.
        """
        if not self.node.inputs[place].is_const():
            raise ValueError(f"{self.node.type} with an argument that is computed")
        return self.node.inputs[place].get_tensor_value(as_list=False)


def converts(*operations: str) -> Callable[[Any], Any]:
    """Decorator that registers a function as the handler of TensorFlow operations.

    The function gets a writer and the names of the inputs. It returns the name of the result (a tuple of several), or
    None to leave the node as it is: an ONNX operator of the same name, or an operation that the export refuses.
    """

    def register(write: Callable[..., Any]) -> Callable[..., Any]:
        def handler(graph: Any, node: Any, *_: Any) -> None:
            results = write(Nodes(graph, node), *node.input)
            if results is not None:
                results = results if isinstance(results, tuple) else (results,)
                shapes, types, outputs = node.output_shapes, node.output_dtypes, node.output
                graph.remove_node(node.name)
                for result, output, shape, type_ in zip(results, outputs, shapes, types, strict=True):
                    graph.make_node("Identity", [result], outputs=[output], shapes=[shape], dtypes=[type_])

        HANDLERS.update(dict.fromkeys(operations, (handler, [])))
        return write

    return register
