"""Builds ONNX graphs node by node, with unique names and equal constants stored once; walks nested graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class GraphBuilder:
    """A graph under construction.

    Args:
        prefix: Prefix of every generated name; a graph within a graph needs its own.
        returns_states: Whether the states after the last step are among its outputs.
    """

    def __init__(self, prefix: str = "", returns_states: bool = True) -> None:
        self.prefix, self.returns_states = prefix, returns_states
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; returns the name of its output, or a list of names if it has several."""
        names = [f"{self.prefix}{operator}_{len(self.nodes)}.{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: np.ndarray) -> str:
        """Adds a constant, or finds an equal one; returns its name."""
        array = np.ascontiguousarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = f"{self.prefix}constant_{len(self._constants)}"
            self.initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def graph(
        self, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.GraphProto:
        """Returns the graph between these inputs and outputs."""
        return helper.make_graph(self.nodes, name, inputs, outputs, list(self.initializers.values()))


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yields the graphs that a node holds directly, such as the body of a loop."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yields a graph and all graphs within it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner)


def add_prefix(graph: onnx.GraphProto, prefix: str) -> None:
    """Puts a prefix before all names of a graph and of the graphs within it.

    `onnx.compose.add_prefix` leaves out what a graph within a graph reads from outside.
    """
    for each in all_graphs(graph):
        for named in (*each.node, *each.initializer, *each.input, *each.output, *each.value_info):
            named.name = prefix + named.name
        for node in each.node:
            node.input[:] = [name and prefix + name for name in node.input]
            node.output[:] = [name and prefix + name for name in node.output]


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yields nodes, and all nodes of the graphs within them."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from all_nodes(graph.node)


def count_operators(graph: onnx.GraphProto) -> dict[str, int]:
    """How often each operator is in a graph and in the graphs within it, the most frequent first."""
    counts = Counter(node.op_type for node in all_nodes(graph.node))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
