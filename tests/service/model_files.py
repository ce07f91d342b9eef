"""ONNX files made for a test: of a few nodes, and with data beside the file."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper


def bare_model(nodes: list[onnx.NodeProto], **more: object) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", [], [], **more)
    return helper.make_model(graph, ir_version=8)


def with_external_data(location: str, place: str = "initializer") -> bytes:
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[16], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    if place == "initializer":
        return bytes(bare_model([], initializer=[tensor]).SerializeToString())
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=tensor))
    if place == "constant":
        return bytes(bare_model([constant]).SerializeToString())
    body = helper.make_graph([constant], "body", [], [])
    node = helper.make_node("If", ["yes"], ["c"], then_branch=body, else_branch=body)
    if place == "subgraph":
        return bytes(bare_model([node]).SerializeToString())
    whole = bare_model([])
    whole.functions.append(helper.make_function("own", "F", [], [], [node], []))
    return bytes(whole.SerializeToString())
