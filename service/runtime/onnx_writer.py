"""Writes small ONNX graphs as protocol buffers, and puts nodes around the graph of a model file.

Written by hand, although the images contain the package `onnx`: the service itself does without it. Importing it takes
a server's start a sixth of a second and 12 MB a process, and it parses a whole file, weights included, where these
functions copy bytes. The few messages that are needed are short. Field numbers:
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from cellserve.service.runtime.onnx_file import raw_fields

_ELEMENT_TYPES = {"float32": 1, "int32": 6, "int64": 7, "bool": 9}
_INT, _INTS = 2, 7  # types of attributes
_IR_VERSION, _OPSET = 8, 17
_MODEL_OPSET, _MODEL_GRAPH = 8, 7
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13  # fields of GraphProto

Shape = Sequence[int | str]  # a text is the name of an axis whose length may vary


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int | Sequence[int]) -> bytes:
    """Returns a node as a field of a graph."""
    content = b"".join(_bytes(1, name.encode()) for name in inputs)
    content += b"".join(_bytes(2, name.encode()) for name in outputs)
    # ONNX Runtime names the node in its messages.
    content += _bytes(3, f"{outputs[0]}.{operator}".encode()) + _bytes(4, operator.encode())
    for name, value in attributes.items():
        attribute = _bytes(1, name.encode())
        if isinstance(value, int):
            attribute += _number(3, value) + _number(20, _INT)
        else:
            attribute += b"".join(_number(8, each) for each in value) + _number(20, _INTS)
        content += _bytes(5, attribute)
    return _bytes(_NODE, content)


def graph_input(name: str, dtype: str, shape: Shape) -> bytes:
    """Returns an input as a field of a graph."""
    return _bytes(_INPUT, _value_info(name, dtype, shape))


def graph_output(name: str, dtype: str, shape: Shape) -> bytes:
    """Returns an output as a field of a graph."""
    return _bytes(_OUTPUT, _value_info(name, dtype, shape))


def zero(name: str) -> bytes:
    """Returns the float32 number 0, a constant, as a field of a graph."""
    return _constant(name, "float32", (), bytes(4))


def false(name: str) -> bytes:
    """Returns a constant that is false, as a field of a graph."""
    return _constant(name, "bool", (), bytes(1))


def integers(name: str, values: Sequence[int]) -> bytes:
    """Returns a list of int64, a constant, as a field of a graph."""
    return _constant(name, "int64", (len(values),), b"".join(value.to_bytes(8, "little") for value in values))


def model(fields: Iterable[bytes]) -> bytes:
    """Returns a model file whose graph has these fields."""
    graph = _bytes(2, b"graph") + b"".join(fields)
    return _number(1, _IR_VERSION) + _bytes(_MODEL_OPSET, _number(2, _OPSET)) + _bytes(_MODEL_GRAPH, graph)


def opset(content: bytes) -> int:
    """Returns the version of ONNX's own operators that a model file uses; 0 if it names none."""
    for number, value, _ in raw_fields(memoryview(content)):
        if number == _MODEL_OPSET and isinstance(value, memoryview):
            imported = {field: each for field, each, _ in raw_fields(value)}
            version = imported.get(2, 0)
            if not imported.get(1) and isinstance(version, int):
                return version
    return 0


def surrounded(
    content: bytes, before: Iterable[bytes], after: Iterable[bytes], internal: Collection[str], hidden: Collection[str]
) -> bytes:
    """Returns a model file with fields added to its graph.

    Args:
        content: The file.
        before: Fields to put before its nodes, such as nodes that give what were its inputs.
        after: Fields to put behind them.
        internal: Inputs of the graph that are no longer inputs.
        hidden: Outputs of the graph that are no longer outputs.
    """
    rest, graph = [], [b"".join(before)]
    for number, value, raw in raw_fields(memoryview(content)):
        if number != _MODEL_GRAPH or not isinstance(value, memoryview):
            rest.append(bytes(raw))
            continue
        for field, inner, inner_raw in raw_fields(value):
            if field == _INPUT and isinstance(inner, memoryview) and _name(inner) in internal:
                graph.append(_bytes(_VALUE_INFO, bytes(inner)))  # what is known of its shape
            elif not (field == _OUTPUT and isinstance(inner, memoryview) and _name(inner) in hidden):
                graph.append(bytes(inner_raw))
    return b"".join([*rest, _bytes(_MODEL_GRAPH, b"".join([*graph, *after]))])


def _name(value_info: memoryview) -> str:
    return next((str(value, "utf-8") for number, value, _ in raw_fields(value_info) if number == 1), "")  # type: ignore[arg-type]


def _constant(name: str, dtype: str, shape: Sequence[int], raw: bytes) -> bytes:
    axes = b"".join(_number(1, size) for size in shape)
    content = axes + _number(2, _ELEMENT_TYPES[dtype]) + _bytes(8, name.encode()) + _bytes(9, raw)
    return _bytes(_INITIALIZER, content)


def _value_info(name: str, dtype: str, shape: Shape) -> bytes:
    axes = (_number(1, size) if isinstance(size, int) else _bytes(2, size.encode()) for size in shape)
    tensor = _number(1, _ELEMENT_TYPES[dtype]) + _bytes(2, b"".join(_bytes(1, axis) for axis in axes))
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, tensor))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Encodes a number that is not negative."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
