"""Builds ONNX graphs node by node: names made unique, equal constants stored once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class GraphBuilder:
    """A graph under construction.

    Args:
        prefix: Begins every name that is made here; a graph within a graph needs one of its own.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; gives its output's name, or a list of them where there are several."""
        names = [f"{self.prefix}{operator}_{len(self.nodes)}.{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: np.ndarray) -> str:
        """Adds a constant, or finds an equal one; gives its name."""
        array = np.ascontiguousarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = f"{self.prefix}constant_{len(self._constants)}"
            self.initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def graph(
        self, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.GraphProto:
        """Gives the graph between these inputs and outputs."""
        return helper.make_graph(self.nodes, name, inputs, outputs, list(self.initializers.values()))


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Gives a graph and those within it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)
