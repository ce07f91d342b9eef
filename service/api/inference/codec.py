"""Bodies of `infer`: JSON, with tensors in it or as bytes after it (Triton's binary tensor data extension).

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cellserve.service.api.inference.service import InferenceResult
from cellserve.service.api.inference.tensors import DATATYPES, check_datatype, from_bytes, from_json
from cellserve.service.api.json_parts import byte_parts, json_parts
from cellserve.service.errors import InvalidInput
from cellserve.service.model_repository.model import Model
from cellserve.service.validation.json_input import decode

Array = NDArray[Any]

HEADER_LENGTH = b"inference-header-content-length"
_JSON, _BINARY = (b"content-type", b"application/json"), (b"content-type", b"application/octet-stream")
_UNSUPPORTED = ("shared_memory_region", "classification")  # parameters of unsupported extensions


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.Raw(b"")


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


_decoder = msgspec.json.Decoder(_Request)


class InferRequest(NamedTuple):
    """A decoded request."""

    id: str
    tensors: dict[str, Array]
    parameters: dict[str, Any]
    outputs: dict[str, bool]  # names of the requested outputs, and whether each is sent as bytes


def read(body: bytes, header_length: bytes | None, model: Model) -> InferRequest:
    """Decodes the body of a request.

    Args:
        body: The decompressed body.
        header_length: The header `Inference-Header-Content-Length`, if the request has it: the length of the JSON.
        model: The requested model.

    Raises:
        NotJson: The body cannot be parsed.
        InvalidInput: Something in it is invalid.
    """
    length = len(body)
    if header_length is not None:
        if not (header_length.isdigit() and len(header_length) < 20 and int(header_length) <= len(body)):
            raise InvalidInput(
                f"Inference-Header-Content-Length: send the length of the JSON, at most the body's {len(body)} bytes"
            )
        length = int(header_length)
        if not length:
            return _read_raw(body, model)
    request = decode(_decoder, body[:length])
    binary = memoryview(body)[length:]
    tensors: dict[str, Array] = {}
    for tensor in request.inputs:
        check_parameters(tensor.name, tensor.parameters)
        if tensor.name in tensors:
            raise InvalidInput(f"inputs: {tensor.name!r} appears twice", place="inputs")
        check_datatype(tensor.name, tensor.datatype, model.inputs.specs)
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            if not tensor.data:
                raise InvalidInput(f"{tensor.name}: send its data", place=tensor.name)
            tensors[tensor.name] = from_json(tensor.name, tensor.datatype, tensor.shape, tensor.data)
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary) or tensor.data:
            raise InvalidInput(
                f"{tensor.name}: binary_data_size: send how many of the {len(binary)} bytes after the JSON belong to "
                f"it, and no data",
                place=tensor.name,
            )
        tensors[tensor.name] = from_bytes(tensor.name, tensor.datatype, tensor.shape, binary[:size])
        binary = binary[size:]
    if len(binary):
        raise InvalidInput(f"{len(binary)} bytes after the JSON belong to no input: send binary_data_size with each")
    return InferRequest(request.id, tensors, request.parameters, _requested_outputs(request, model))


def _read_raw(body: bytes, model: Model) -> InferRequest:
    """Decodes a body without JSON, the bytes of the model's only input: one sequence."""
    if len(model.inputs.specs) > 1:
        raise InvalidInput("the body has no JSON, and the model has several inputs: send JSON that describes them")
    spec = model.inputs.specs[0]
    datatype, step = DATATYPES[spec.dtype], np.dtype(spec.dtype).itemsize * math.prod(spec.shape)
    if not body or len(body) % step:
        raise InvalidInput(
            f"{spec.name}: {len(body)} bytes: send a multiple of a time step's {step} bytes", place=spec.name
        )
    x = from_bytes(spec.name, datatype, (1, len(body) // step, *spec.shape), body)
    return InferRequest("", {spec.name: x}, {}, {output.name: True for output in model.document.signature.outputs})


def check_parameters(name: str, parameters: Any) -> None:
    """Raises InvalidInput if a tensor's parameters need an unsupported extension."""
    for parameter in _UNSUPPORTED:
        if parameter in parameters:
            raise InvalidInput(
                f"{name}: this server does not support {parameter}: send and receive the tensor itself", place=name
            )


def check_output(name: str, parameters: Any, model: Model) -> None:
    """Raises InvalidInput if a requested output is not one of the model's."""
    known = [spec.name for spec in model.document.signature.outputs]
    if name not in known:
        raise InvalidInput(f"outputs: the model has no {name[:80]!r}: request {', '.join(known)}", place="outputs")
    check_parameters(name, parameters)


def _requested_outputs(request: _Request, model: Model) -> dict[str, bool]:
    every = _flag(request.parameters, "binary_data_output", False)
    for output in request.outputs:
        check_output(output.name, output.parameters, model)
    if request.outputs:
        return {output.name: _flag(output.parameters, "binary_data", every) for output in request.outputs}
    return {spec.name: every for spec in model.document.signature.outputs}


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidInput(f"{name}: send true or false", place=name)
    return value


def write(request: InferRequest, result: InferenceResult) -> tuple[list[tuple[bytes, bytes]], Iterator[bytes]]:
    """Returns the headers and the parts of an answer's body."""
    outputs, contents = [], []
    for name, as_bytes in request.outputs.items():
        y = result.outputs[name]
        output: dict[str, Any] = {"name": name, "datatype": DATATYPES[y.dtype.name], "shape": y.shape}
        if as_bytes:
            contents.append(y)
            output["parameters"] = {"binary_data_size": y.nbytes}
        else:
            output["data"] = y.ravel()
        outputs.append(output)
    document: dict[str, Any] = {"model_name": result.model.name, "model_version": str(result.model.version)}
    if request.id:
        document["id"] = request.id
    if result.parameters:
        document["parameters"] = result.parameters
    document["outputs"] = outputs
    if not contents:
        return [_JSON], json_parts(document)
    head = b"".join(json_parts(document))
    return [_BINARY, (HEADER_LENGTH, b"%d" % len(head))], chain((head,), *map(byte_parts, contents))
