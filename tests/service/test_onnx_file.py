"""What a model file is looked over for, before ONNX Runtime sees it."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cellserve.models.signature import METADATA_KEY
from cellserve.service.runtime import onnx_file
from cellserve.service.runtime.onnx_file import BadModelFile, scan, validate
from tests.service.model_files import bare_model, with_external_data


def test_field_numbers_are_those_of_onnx() -> None:
    for kind, inside in onnx_file._INSIDE.items():
        fields = {field.number: field for field in getattr(onnx, kind).DESCRIPTOR.fields}
        assert {number: fields[number].message_type.name for number in inside} == inside
        texts = onnx_file._TEXTS.get(kind, {})
        assert {number: fields[number].name for number in texts} == texts
    # And no way to a tensor or a node is left out but those of training, which is never run.
    kinds = set(onnx_file._INSIDE)
    for kind, inside in onnx_file._INSIDE.items():
        there = {
            f.number for f in getattr(onnx, kind).DESCRIPTOR.fields if f.message_type and f.message_type.name in kinds
        }
        texts_only = {
            f.number
            for f in getattr(onnx, kind).DESCRIPTOR.fields
            if f.message_type and f.message_type.name == "StringStringEntryProto"
        }
        assert there - texts_only <= set(inside)
    numbers = {field.name: field.number for field in TensorProto.DESCRIPTOR.fields}
    assert (numbers["external_data"], numbers["data_location"]) == (13, 14)


def test_operators_and_metadata_of_exported_models_are_found(repository: Path) -> None:
    for path in repository.glob("*/1/*.onnx"):
        content = path.read_bytes()
        proto = onnx.load_model_from_string(content)
        found = validate(content)
        assert found.metadata == {entry.key: entry.value for entry in proto.metadata_props}
        assert {(node.domain, node.op_type) for node in proto.graph.node} <= found.operators
    assert METADATA_KEY in validate((repository / "lstm/1/model.onnx").read_bytes()).metadata
    inside = validate((repository / "decaying/1/model.onnx").read_bytes()).operators
    assert {("", "Scan"), ("", "MatMul")} <= inside


@pytest.mark.parametrize("place", ["initializer", "constant", "subgraph", "function"])
@pytest.mark.parametrize("location", ["weights.bin", "../../etc/passwd", "/etc/passwd"])
def test_tensors_in_other_files_are_refused_wherever_they_are(place: str, location: str) -> None:
    with pytest.raises(BadModelFile, match="another file"):
        validate(with_external_data(location, place))


@pytest.mark.parametrize("domain", ["custom.ops", "ai.onnx.contrib", "com.microsoft.nchwc"])
def test_operators_of_a_library_of_their_own_are_refused_and_named(domain: str) -> None:
    node = helper.make_node("Steal", [], ["y"], domain=domain)
    with pytest.raises(BadModelFile, match=re.escape(f"{domain}.Steal")):
        validate(bare_model([node]).SerializeToString())
    body = helper.make_graph([node], "body", [], [])
    within = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=body)
    with pytest.raises(BadModelFile, match=re.escape(f"{domain}.Steal")):
        validate(bare_model([within]).SerializeToString())


def test_operators_that_the_file_itself_defines_are_taken() -> None:
    whole = bare_model([helper.make_node("Twice", ["x"], ["y"], domain="own")])
    add = helper.make_node("Add", ["x", "x"], ["y"])
    whole.functions.append(helper.make_function("own", "Twice", ["x"], ["y"], [add], []))
    assert validate(whole.SerializeToString()).functions == {("own", "Twice")}
    whole.functions[0].node.append(helper.make_node("Steal", [], [], domain="custom.ops"))
    with pytest.raises(BadModelFile, match=r"custom\.ops\.Steal"):
        validate(whole.SerializeToString())


def test_graphs_nested_a_thousand_deep_are_read() -> None:
    content = b""
    for _ in range(1000):  # a node with an attribute that is a graph with a node ...
        graph = _field(1, content)
        content = _field(5, _field(6, graph))
    scan(_field(7, _field(1, content)))


def _field(number: int, content: bytes) -> bytes:
    size, varint = len(content), b""
    while size >= 0x80:
        varint, size = varint + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + varint + bytes([size]) + content


@given(st.binary(max_size=200))
def test_garbage_is_read_or_refused(content: bytes) -> None:
    try:
        validate(content)
    except BadModelFile as bad:
        assert len(str(bad)) < 500


@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(data: st.DataObject) -> None:
    content = bytearray(with_external_data("weights.bin", "function"))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        scan(cut)
    except BadModelFile:
        return
    # What is taken for a model here, onnx reads too, and finds no other operators in it.
    try:
        proto = onnx.load_model_from_string(cut)
    except Exception:
        return
    assert {(node.domain, node.op_type) for node in proto.graph.node} <= scan(cut).operators


def test_onnx_runtime_would_have_read_a_file_beside_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why tensors in other files are refused here, whatever ONNX Runtime does about some of them."""
    import onnxruntime as ort

    (tmp_path / "weights.bin").write_bytes(b"A" * 16)
    monkeypatch.chdir(tmp_path)
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[16], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    y = helper.make_tensor_value_info("y", TensorProto.UINT8, [16])
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "graph", [], [y], [tensor])
    content = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert bytes(session.run(None, {})[0]) == b"A" * 16
    with pytest.raises(BadModelFile, match="another file"):
        validate(content)
