"""gRPC messages of the protocol: tensors from requests, outputs to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb

from cellserve.service.api.inference.codec import check_parameters
from cellserve.service.api.inference.tensors import DATATYPES, check_datatype, from_bytes, from_numbers
from cellserve.service.errors import InvalidInput
from cellserve.service.model_repository.model import Model

Array = NDArray[Any]
Message = Any  # a message of the protocol, or grpc's context

_CONTENTS = {"FP32": "fp32_contents", "INT32": "int_contents", "INT64": "int64_contents"}


def read_tensors(request: Message, model: Model) -> dict[str, Array]:
    """Returns the tensors of a request, which are all raw or all typed."""
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
        if name in tensors:
            raise InvalidInput(f"inputs: {name!r} appears twice", place="inputs")
        check_datatype(name, tensor.datatype, model.inputs.specs)
        if raw:
            if tensor.HasField("contents"):
                raise InvalidInput(f"{name}: send contents or raw_input_contents, not both", place=name)
            tensors[name] = from_bytes(name, tensor.datatype, tensor.shape, raw[number])
        else:
            contents = getattr(tensor.contents, _CONTENTS.get(tensor.datatype, "fp32_contents"))
            tensors[name] = from_numbers(name, tensor.datatype, tensor.shape, contents)
    return tensors


def write_answer(head: dict[str, str], outputs: dict[str, Array], parameters: dict[str, Any]) -> Message:
    """Returns the answer to a request.

    Args:
        head: The model's name and version, and the request's id.
        outputs: The outputs by name.
        parameters: The answer's parameters.
    """
    answer = pb.ModelInferResponse(**head, raw_output_contents=[y.tobytes() for y in outputs.values()])
    for name, y in outputs.items():
        answer.outputs.add(name=name, datatype=DATATYPES[y.dtype.name], shape=y.shape)
    for name, value in parameters.items():
        _set(answer.parameters[name], value)
    return answer


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
