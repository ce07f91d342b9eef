"""Looks into a model file before ONNX Runtime does: what it says of itself, its operators, other files that it names.

An ONNX file is a protocol buffer (https://protobuf.dev/programming-guides/encoding, messages and field numbers in
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3); the few fields that matter are read here, so that the service
needs no package for them and nothing of a file is acted upon before all of it has been looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

# What ONNX Runtime has operators of itself; all others would have to come from a library, and none is ever loaded.
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types; groups are deprecated, and ONNX has none
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_TAG_BYTES, _VARINT_BYTES = 5, 10

# Which fields of a message are messages that matter.
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
# And which are texts or numbers that do.
_TEXTS: dict[str, dict[int, str]] = {
    "NodeProto": {4: "op_type", 7: "domain"},
    "FunctionProto": {1: "name", 10: "domain"},
    "StringStringEntryProto": {1: "key", 2: "value"},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of TensorProto


class BadModelFile(ValueError):
    """The file is no ONNX model, or one that is not to be opened; the message says why."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What stands in a model file."""

    metadata: dict[str, str] = field(default_factory=dict)
    operators: set[tuple[str, str]] = field(default_factory=set)  # (domain, operator), in graphs within graphs too
    functions: set[tuple[str, str]] = field(
        default_factory=set
    )  # (domain, name), operators that the file itself defines
    external: bool = False  # whether a tensor's numbers are in another file


def check(content: bytes) -> ModelFile:
    """Reads a model file and checks that it can be opened without anything beside it.

    Raises:
        BadModelFile: It is damaged, has operators that ONNX Runtime has not, or keeps tensors in other files.
    """
    file = read(content)
    if file.external:
        # ONNX Runtime would look for them in the folder that the service was started in.
        raise BadModelFile(
            "it keeps tensors in another file: save it as one file (onnx.save with save_as_external_data=False)"
        )
    unknown = sorted(
        f"{domain}.{operator}" for domain, operator in file.operators - file.functions if domain not in DOMAINS
    )
    if unknown:
        raise BadModelFile(
            f"it has operators of a library of their own, and none is loaded here: {', '.join(unknown[:5])[:200]}; "
            f"export it with operators of ONNX or of {DOMAINS[-1]}"
        )
    return file


def read(content: bytes) -> ModelFile:
    """Reads a model file.

    Raises:
        BadModelFile: It is not a protocol buffer of that kind.
    """
    metadata: dict[str, str] = {}
    operators, functions = set(), set()
    external = False
    waiting = [("ModelProto", memoryview(content))]  # and no recursion, however deep graphs are nested
    while waiting:
        kind, message = waiting.pop()
        inside, texts = _INSIDE[kind], _TEXTS.get(kind, {})
        told = dict.fromkeys(texts.values(), "")
        for number, value in _fields(message):
            if isinstance(value, int):
                external |= kind == "TensorProto" and number == _DATA_LOCATION and value != 0
            elif number in inside:
                waiting.append((inside[number], value))
            elif number in texts:
                told[texts[number]] = _text(value)
            else:
                external |= kind == "TensorProto" and number == _EXTERNAL_DATA
        match kind:
            case "NodeProto":
                operators.add((told["domain"], told["op_type"]))
            case "FunctionProto":
                functions.add((told["domain"], told["name"]))
            case "StringStringEntryProto":
                metadata[told["key"]] = told["value"]
    return ModelFile(metadata, operators, functions, external)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Gives the fields of a message: their numbers, and their values as numbers or bytes; fixed ones are left out."""
    place, end = 0, len(message)
    while place < end:
        tag, place = _varint(message, place, _TAG_BYTES)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise _damaged()
        if wire == _VARINT:
            value, place = _varint(message, place, _VARINT_BYTES)
            yield number, value
        elif wire == _LENGTH:
            size, place = _varint(message, place, _VARINT_BYTES)
            if size > end - place:
                raise _damaged()
            yield number, message[place : place + size]
            place += size
        else:
            place += _SIZES.get(wire, end)
            if place > end:
                raise _damaged()


def _varint(message: memoryview, place: int, most: int) -> tuple[int, int]:
    value = 0
    for count, byte in enumerate(message[place : place + most]):
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
    return BadModelFile("it is no ONNX file, or a damaged one")
