"""Judges a model file before ONNX Runtime opens it: its metadata, its operators, and references to other files.

An ONNX file is a protocol buffer (https://protobuf.dev/programming-guides/encoding; messages and field numbers in
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3). The few fields that matter are scanned here, without
recursion, so that the service needs no further package and opens no file before all of it has been checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

# Domains of ONNX Runtime's own operators; all others would need a custom library, and none is ever loaded.
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types; ONNX has no groups, which are deprecated
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_TAG_BYTES, _VARINT_BYTES = 5, 10

# The relevant fields of a message that are messages.
_INSIDE: dict[str, dict[int, str]] = {
    "ModelProto": {
        7: "GraphProto",
        14: "StringStringEntryProto",
        20: "TrainingInfoProto",
        25: "FunctionProto",
    },
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "StringStringEntryProto": {},
    "TensorProto": {},
}
# The relevant fields that are texts.
_TEXTS: dict[str, dict[int, str]] = {
    "NodeProto": {4: "op_type", 7: "domain"},
    "FunctionProto": {1: "name", 10: "domain"},
    "StringStringEntryProto": {1: "key", 2: "value"},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # fields of TensorProto


class BadModelFile(ValueError):
    """The file is not an ONNX model, or must not be opened; the message says why."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The relevant content of a model file."""

    metadata: dict[str, str] = field(default_factory=dict)
    operators: set[tuple[str, str]] = field(default_factory=set)  # (domain, operator), nested graphs included
    functions: set[tuple[str, str]] = field(default_factory=set)  # (domain, name) of operators that the file defines
    external: bool = False  # whether a tensor's data are in another file


def validate(content: bytes) -> ModelFile:
    """Scans a model file and checks that it can be opened on its own.

    Raises:
        BadModelFile: It is damaged, uses operators that ONNX Runtime does not have, or keeps tensors in other files.
    """
    file = scan(content)
    if file.external:
        # ONNX Runtime would look for them in the service's working directory.
        raise BadModelFile(
            "it keeps tensors in another file: save it as one file (onnx.save with save_as_external_data=False)"
        )
    unknown = sorted(
        f"{domain}.{operator}" for domain, operator in file.operators - file.functions if domain not in DOMAINS
    )
    if unknown:
        raise BadModelFile(
            f"it has operators of a custom library, and none is loaded here: {', '.join(unknown[:5])[:200]}; "
            f"export it with operators of ONNX or of {DOMAINS[-1]}"
        )
    return file


def scan(content: bytes) -> ModelFile:
    """Scans a model file.

    Raises:
        BadModelFile: It is not an ONNX protocol buffer.
    """
    metadata: dict[str, str] = {}
    operators, functions = set(), set()
    external = False
    pending = [("ModelProto", memoryview(content))]  # an explicit stack: a malicious file cannot exhaust recursion
    while pending:
        kind, message = pending.pop()
        inside, texts = _INSIDE[kind], _TEXTS.get(kind, {})
        values = dict.fromkeys(texts.values(), "")
        for number, value, _ in raw_fields(message):
            if value is None:
                continue
            if isinstance(value, int):
                external |= kind == "TensorProto" and number == _DATA_LOCATION and value != 0
            elif number in inside:
                pending.append((inside[number], value))
            elif number in texts:
                values[texts[number]] = _text(value)
            else:
                external |= kind == "TensorProto" and number == _EXTERNAL_DATA
        match kind:
            case "NodeProto":
                operators.add((values["domain"], values["op_type"]))
            case "FunctionProto":
                functions.add((values["domain"], values["name"]))
            case "StringStringEntryProto":
                metadata[values["key"]] = values["value"]
    return ModelFile(metadata, operators, functions, external)


def raw_fields(message: memoryview) -> Iterator[tuple[int, int | memoryview | None, memoryview]]:
    """Yields the numbers, the values (integers or bytes; None for fixed-width fields) and all bytes of fields.

    Raises:
        BadModelFile: The message is damaged.
    """
    place, end = 0, len(message)
    while place < end:
        start = place
        value: int | memoryview | None
        tag, place = _varint(message, place, _TAG_BYTES)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise _damaged()
        if wire == _VARINT:
            value, place = _varint(message, place, _VARINT_BYTES)
        elif wire == _LENGTH:
            size, place = _varint(message, place, _VARINT_BYTES)
            if size > end - place:
                raise _damaged()
            value = message[place : place + size]
            place += size
        else:
            value = None
            place += _SIZES.get(wire, end)
            if place > end:
                raise _damaged()
        yield number, value, message[start:place]


def _varint(message: memoryview, place: int, max_bytes: int) -> tuple[int, int]:
    value = 0
    for count, byte in enumerate(message[place : place + max_bytes]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, place + count + 1
    raise _damaged()


def _text(value: memoryview) -> str:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        raise _damaged() from None


def _damaged() -> BadModelFile:
    return BadModelFile("it is not an ONNX file, or is damaged")
