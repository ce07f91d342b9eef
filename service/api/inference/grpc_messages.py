"""gRPC messages of the protocol: tensors from requests, outputs to answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb

from cellserve.models.signature import Signature
from cellserve.service.api.answer_size import LARGE
from cellserve.service.api.inference.codec import LONGEST_ID, PARAMETERS, check_names, check_parameters
from cellserve.service.api.inference.tensors import DATATYPES, check_datatype, from_bytes, from_numbers
from cellserve.service.errors import InvalidInput

Array = NDArray[Any]
Message = Any  # a message of the protocol, or grpc's context

_LENGTH_DELIMITED, _RAW_INPUT_CONTENTS = 2, 7  # a wire type, and the number of a field
_RAW_OUTPUT_CONTENTS, _INFER_RESPONSE = 6, 2  # of an answer, and of a stream's message
_MOST_FIELDS = 64  # that are looked at; a request has fewer
_MOST_OUTPUTS = 256
_CONTENTS = {"FP32": "fp32_contents", "INT32": "int_contents", "INT64": "int64_contents"}


class RequestHead(NamedTuple):
    """A request without its tensors."""

    model: str
    version: str
    id: str
    parameters: dict[str, Any]
    outputs: list[tuple[str, list[str]]]  # names of the requested outputs, and of their parameters

    @property
    def sequence(self) -> tuple[str, str]:
        """The model and the sequence that it belongs to; without a sequence, the latter is empty."""
        return self.model, str(self.parameters.get("sequence_id") or "")


def parse(kind: type[Message], content: bytes) -> Message:
    """Parses a message; raises InvalidInput if it is none."""
    try:
        return kind.FromString(content)
    except (DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the message is no {kind.__name__}: {error}: send one of the protocol") from None


def read_head(content: bytes) -> RequestHead:
    """Returns the head of a `ModelInferRequest`."""
    request = parse(pb.ModelInferRequest, content)
    if len(request.id) > LONGEST_ID:
        raise InvalidInput(f"id: send at most {LONGEST_ID} characters", place="id")
    # Indexing would add a missing parameter.
    parameters = {name: plain(request.parameters[name]) for name in PARAMETERS if name in request.parameters}
    outputs = [(one.name, list(one.parameters)) for one in request.outputs[:_MOST_OUTPUTS]]
    return RequestHead(request.model_name, request.model_version, request.id, parameters, outputs)


def slow_bytes(content: bytes) -> int:
    """Returns how many bytes of a `ModelInferRequest` take time to parse: all but `raw_input_contents`, its bulk.

    https://protobuf.dev/programming-guides/encoding/
    """
    place, slow = 0, len(content)
    for _ in range(_MOST_FIELDS):
        tag, place = _varint(content, place)
        if tag & 7 != _LENGTH_DELIMITED:
            break  # the fields with that much in them are not of this kind, or it is no request
        length, place = _varint(content, place)
        if tag >> 3 == _RAW_INPUT_CONTENTS:
            slow -= min(length, len(content) - place)
        place += length
        if place >= len(content):
            break
    return slow


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    for byte in content[place : place + 5]:
        value |= (byte & 0x7F) << shift
        shift, place = shift + 7, place + 1
        if byte < 0x80:
            break
    return value, place


def read_tensors(signature: Signature, content: bytes) -> dict[str, Array]:
    """Returns the tensors of a `ModelInferRequest`, which are all raw or all typed."""
    request = parse(pb.ModelInferRequest, content)
    check_names((tensor.name for tensor in request.inputs), signature)
    raw: Sequence[bytes] = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(
            f"raw_input_contents: {len(raw)} for {len(request.inputs)} inputs: send one for each input, or none at all",
            place="raw_input_contents",
        )
    tensors: dict[str, Array] = {}
    for number, tensor in enumerate(request.inputs):
        name = tensor.name
        check_parameters(name, tensor.parameters)
        check_datatype(name, tensor.datatype, signature.inputs)
        if raw:
            if tensor.HasField("contents"):
                raise InvalidInput(f"{name}: send contents or raw_input_contents, not both", place=name)
            tensors[name] = from_bytes(name, tensor.datatype, tensor.shape, raw[number])
        else:
            contents = getattr(tensor.contents, _CONTENTS.get(tensor.datatype, "fp32_contents"))
            tensors[name] = from_numbers(name, tensor.datatype, tensor.shape, contents)
    return tensors


def write_head(head: dict[str, str], outputs: dict[str, Array], parameters: dict[str, Any]) -> Message:
    """Returns the answer to a request, without what its outputs hold.

    Args:
        head: The model's name and version, and the request's id.
        outputs: The outputs by name.
        parameters: The answer's parameters.
    """
    answer = pb.ModelInferResponse(**head)
    for name, y in outputs.items():
        answer.outputs.add(name=name, datatype=DATATYPES[y.dtype.name], shape=y.shape)
    for name, value in parameters.items():
        _set(answer.parameters[name], value)
    return answer


async def write_answer(answer: Message, outputs: Iterable[Array], streamed: bool = False) -> bytes:
    """Returns an answer of `write_head` with what its outputs hold, as a message of a stream or as itself.

    Large outputs are copied once, in an iteration of the event loop of its own, and sent in the next: protobuf would
    copy them three times in one.
    """
    parts: list[Any] = [answer.SerializeToString()]
    for y in outputs:
        parts += [_field(_RAW_OUTPUT_CONTENTS, y.nbytes), np.ascontiguousarray(y).reshape(-1).view(np.uint8).data]
    size = sum(map(len, parts))
    if streamed:
        parts.insert(0, _field(_INFER_RESPONSE, size))
    if size <= LARGE:
        return b"".join(parts)
    await asyncio.sleep(0)
    content = b"".join(parts)
    await asyncio.sleep(0)
    return content


def _field(number: int, length: int) -> bytes:
    """Returns what stands before so many bytes that are a message's field."""
    written = bytearray([number << 3 | _LENGTH_DELIMITED])
    while length > 0x7F:
        written.append(length & 0x7F | 0x80)
        length >>= 7
    written.append(length)
    return bytes(written)


def plain(parameter: Message) -> Any:
    """Returns a parameter's value, None if it has none."""
    which = parameter.WhichOneof("parameter_choice")
    return None if which is None else getattr(parameter, which)


def _set(parameter: Message, value: Any) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, str):
        parameter.string_param = value
    elif value < 2**63:
        parameter.int64_param = value
    else:
        parameter.uint64_param = value
