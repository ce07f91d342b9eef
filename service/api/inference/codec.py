"""Bodies of `infer`: JSON, with tensors in it or as bytes after it (Triton's binary tensor data extension).

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import Signature
from cellserve.service.api.inference.tensors import DATATYPES, check_datatype, from_bytes, from_json
from cellserve.service.errors import InvalidInput, excerpt
from cellserve.service.validation.json_input import decode

if TYPE_CHECKING:
    # Not imported by the decoding process, which needs no engine.
    from cellserve.service.api.inference.service import InferenceResult

Array = NDArray[Any]

HEADER_LENGTH = b"inference-header-content-length"
_JSON, _BINARY = (b"content-type", b"application/json"), (b"content-type", b"application/octet-stream")
PARAMETERS = frozenset(
    ("sequence_id", "sequence_start", "sequence_end", "position")
)  # of a request; others are ignored
LONGEST_ID = 1000  # characters
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


def json_length(header: bytes | None, body: bytes) -> int | None:
    """Returns the length of the JSON at the beginning of a body; None if its header says that there is none.

    Args:
        header: The header `Inference-Header-Content-Length`, if the request has it.
        body: The decompressed body.

    Raises:
        InvalidInput: The header is no such length.
    """
    if header is None:
        return len(body)
    if not (header.isdigit() and len(header) < 20 and int(header) <= len(body)):
        raise InvalidInput(
            f"Inference-Header-Content-Length: send the length of the JSON, at most the body's {len(body)} bytes"
        )
    return int(header) or None


def read(signature: Signature, length: int | None, body: bytes) -> InferRequest:
    """Decodes the body of a request.

    Args:
        signature: The requested model's.
        length: The length of the JSON; None if there is none.
        body: The decompressed body.

    Raises:
        NotJson: The body cannot be parsed.
        InvalidInput: Something in it is invalid.
    """
    if length is None:
        return _read_raw(body, signature)
    request = decode(_decoder, body[:length])
    check_names((tensor.name for tensor in request.inputs), signature)
    if len(request.id) > LONGEST_ID:
        raise InvalidInput(f"id: send at most {LONGEST_ID} characters", place="id")
    binary = memoryview(body)[length:]
    tensors: dict[str, Array] = {}
    for tensor in request.inputs:
        check_parameters(tensor.name, tensor.parameters)
        check_datatype(tensor.name, tensor.datatype, signature.inputs)
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
    parameters = {name: value for name, value in request.parameters.items() if name in PARAMETERS}
    return InferRequest(request.id, tensors, parameters, _requested_outputs(request, signature))


def _read_raw(body: bytes, signature: Signature) -> InferRequest:
    """Decodes a body without JSON, the bytes of the model's only input: one sequence."""
    if len(signature.inputs) > 1:
        raise InvalidInput("the body has no JSON, and the model has several inputs: send JSON that describes them")
    spec = signature.inputs[0]
    datatype, step = DATATYPES[spec.dtype], np.dtype(spec.dtype).itemsize * math.prod(spec.shape)
    if not body or len(body) % step:
        raise InvalidInput(
            f"{spec.name}: {len(body)} bytes: send a multiple of a time step's {step} bytes", place=spec.name
        )
    x = from_bytes(spec.name, datatype, (1, len(body) // step, *spec.shape), body)
    return InferRequest("", {spec.name: x}, {}, {output.name: True for output in signature.outputs})


def check_names(names: Iterable[str], signature: Signature) -> None:
    """Raises InvalidInput if tensors are not the model's, each once; it stops at the first that is not."""
    known = [spec.name for spec in signature.inputs] + ([signature.lengths] if signature.lengths else [])
    seen = set()
    for name in names:
        if name not in known:
            raise InvalidInput(f"inputs: the model has no {excerpt(name)!r}: send {', '.join(known)}", place="inputs")
        if name in seen:
            raise InvalidInput(f"inputs: {name!r} appears twice", place="inputs")
        seen.add(name)


def check_parameters(name: str, parameters: Any) -> None:
    """Raises InvalidInput if a tensor's parameters need an unsupported extension."""
    for parameter in _UNSUPPORTED:
        if parameter in parameters:
            raise InvalidInput(
                f"{name}: this server does not support {parameter}: send and receive the tensor itself", place=name
            )


def check_output(name: str, parameters: Any, signature: Signature) -> None:
    """Raises InvalidInput if a requested output is not one of the model's."""
    known = [spec.name for spec in signature.outputs]
    if name not in known:
        raise InvalidInput(f"outputs: the model has no {excerpt(name)!r}: request {', '.join(known)}", place="outputs")
    check_parameters(name, parameters)


def _requested_outputs(request: _Request, signature: Signature) -> dict[str, bool]:
    every = _flag(request.parameters, "binary_data_output", False)
    for output in request.outputs:
        check_output(output.name, output.parameters, signature)
    if request.outputs:
        return {output.name: _flag(output.parameters, "binary_data", every) for output in request.outputs}
    return {spec.name: every for spec in signature.outputs}


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidInput(f"{name}: send true or false", place=name)
    return value


def write(request: InferRequest, result: InferenceResult) -> tuple[list[tuple[bytes, bytes]], Iterator[bytes]]:
    """Returns the headers and the parts of an answer's body."""
    # Here and not above: the decoding process, which only reads requests, does without.
    from cellserve.service.api.json_parts import byte_parts, json_parts

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
