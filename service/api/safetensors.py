"""Predictions and states in safetensors (https://github.com/huggingface/safetensors, "Format") instead of JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import parse_qsl

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from cellserve.models.signature import StateSpec, TensorSpec
from cellserve.service.api.json_parts import byte_parts
from cellserve.service.errors import InvalidInput, NotSafetensors, excerpt, listed
from cellserve.service.model_repository.model import Model
from cellserve.service.validation.json_input import check_sequences, split
from cellserve.service.validation.safetensors_header import check_size, read_header
from cellserve.service.validation.tensor_values import validate

Array = NDArray[Any]

_DTYPES = {"F32": "<f4", "I32": "<i4", "I64": "<i8", "U32": "<u4", "U64": "<u8", "I16": "<i2", "U16": "<u2", "I8": "i1",
           "U8": "u1", "F16": "<f2", "F64": "<f8"}  # fmt: skip
_KINDS = {np.dtype(dtype): kind for kind, dtype in _DTYPES.items()}
_KNOWN_HEADERS, _KNOWN_HEADER_BYTES = 512, 512  # that are remembered, and the bytes of the longest
_KNOWN_QUERIES = 128  # that are remembered
MEDIA_TYPES = (b"application/x-safetensors", b"application/octet-stream")

# By header and size of a body: the name, type, number of values, first byte and shape of each tensor.
_known_headers: dict[tuple[bytes, int], list[tuple[str, np.dtype[Any], int, int, tuple[int, ...]]]] = {}


class Options(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The query parameters of a prediction in safetensors."""

    model: str | None = None
    outputs: Literal["last", "all"] | None = None
    return_states: bool = False


@lru_cache(_KNOWN_QUERIES)
def read_options(query: bytes) -> Options:
    """Parses the query; raises InvalidInput if it has other parameters or values."""
    try:
        given = dict(parse_qsl(query.decode(), keep_blank_values=True, strict_parsing=bool(query)))
        return msgspec.convert(given, Options, strict=False)
    except (ValueError, msgspec.ValidationError) as error:
        raise InvalidInput(f"the query: {error}: send model, outputs (last or all), return_states (true)") from None


def read(body: bytes, model: Model, most: int) -> tuple[Sequence[Array], list[dict[str, Array] | None] | None]:
    """Decodes the tensors of a prediction.

    `x` is `[sequences, time, *features]`, or, with `lengths [sequences]`, the time steps of all sequences one after
    the other, `[sum of lengths, *features]`. Several inputs have their own names in place of x. The model's states,
    each `[sequences, *shape]`, are optional initial states. There may be at most so many sequences.

    Returns:
        The sequences, each `[time, *features]`, and the initial states of each, if given.

    Raises:
        NotSafetensors: The body cannot be parsed.
        InvalidInput: A tensor is missing or invalid.
        BodyTooLarge: There are too many sequences.
    """
    (tensors, _), inputs = _load(body), model.inputs
    specs = {"x" if len(inputs.specs) == 1 else spec.name: spec for spec in inputs.specs}
    known = {*specs, "lengths"} | model.reader.states_spec.keys()
    if tensors.keys() - known or specs.keys() - tensors.keys():
        needed = ", ".join(specs)
        raise InvalidInput(
            f"got the tensors {listed(tensors)}: send {needed}, and optionally any of {sorted(known - set(specs))}"
        )
    lengths = tensors.get("lengths")
    counted = next(iter(tensors[name] for name in specs)) if lengths is None else lengths
    check_sequences(len(counted) if counted.ndim else 0, most)
    arrays = {name: _checked(tensors[name], spec, name) for name, spec in specs.items()}
    if lengths is None:
        leading: list[int] | None = None
        for name, spec in specs.items():
            shape, own = list(arrays[name].shape), len(spec.shape)
            if len(shape) != 2 + own or tuple(shape[2:]) != spec.shape or not arrays[name].size:
                raise InvalidInput(
                    f"{name}: its shape is {_told(arrays[name])}: send {_words('sequences', 'time', *spec.shape)}, "
                    f"or {_words('time steps', *spec.shape)} with lengths",
                    place=name,
                )
            leading = leading or shape[:2]
            if shape[:2] != leading:
                raise InvalidInput(
                    f"{name}: its shape is {_told(arrays[name])}, another input's begins with {leading}: "
                    f"send as many time steps",
                    place=name,
                )
        sequences: Sequence[Array] = list(inputs.pack(list(arrays.values())))
    else:
        is_list = lengths.ndim == 1 and lengths.dtype.kind in "iu" and lengths.size
        counts: list[int] = lengths.tolist() if is_list else [0]
        if min(counts) < 1:
            raise InvalidInput("lengths: send one integer per sequence, each at least 1", place="lengths")
        total = sum(counts)  # Python integers, which do not overflow
        for name, spec in specs.items():
            if arrays[name].shape != (total, *spec.shape):
                raise InvalidInput(
                    f"{name}: its shape is {_told(arrays[name])}, lengths need {_words(total, *spec.shape)}: "
                    f"send the time steps of all sequences one after the other, without padding "
                    f"(equally long sequences need no lengths)",
                    place=name,
                )
        x = inputs.pack(list(arrays.values()))
        sequences = split(x, counts)
    given = tensors.keys() & model.reader.states_spec.keys()
    return sequences, _states(tensors, model, len(sequences)) if given else None


def write_states(model: Model, states: dict[str, Array], metadata: dict[str, str]) -> bytes:
    """Encodes one session's states, each `[*shape]`, with metadata."""
    return save(states, {"model": model.name, "version": str(model.version), **metadata})


def read_states(body: bytes, model: Model) -> tuple[dict[str, Array], dict[str, Any]]:
    """Decodes one session's states, each `[*shape]`, and their metadata.

    Raises:
        NotSafetensors: The body cannot be parsed.
        InvalidInput: The tensors are not the model's states: names, shapes or types differ, or a number is not finite.
    """
    (tensors, metadata), specs = _load(body), model.reader.states_spec
    if tensors.keys() != specs.keys():
        raise InvalidInput(f"got the tensors {listed(tensors)}: send the model's states, {sorted(specs)}")
    for name, tensor in tensors.items():
        tensors[name] = _checked(tensor, specs[name], name)
        if tensor.shape != specs[name].shape:
            raise InvalidInput(f"{name}: its shape is {_told(tensor)}: send {list(specs[name].shape)}", place=name)
    return tensors, metadata


def _load(body: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """Decodes tensors of the supported types, and the metadata."""
    end = 8 + int.from_bytes(body[:8], "little")
    known = _known_headers.get((body[:end], len(body))) if end <= _KNOWN_HEADER_BYTES else None
    if known is not None:
        return {
            name: np.frombuffer(body, dtype, count, end + start).reshape(shape)
            for name, dtype, count, start, shape in known
        }, {}
    try:
        check_size(body)
        tensors = {
            name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
            for name, tensor in deserialize(body)  # type: ignore[no-untyped-call]
        }
        header = read_header(body)
        _remember(body, end, header, tensors)
        return tensors, header.get("__metadata__") or {}
    except KeyError as error:
        raise InvalidInput(f"the tensor type {error} is not supported: send one of {', '.join(_DTYPES)}") from None
    except (SafetensorError, ValueError) as error:
        raise NotSafetensors(f"{excerpt(str(error), 200)}: send what safetensors.numpy.save returns") from None


def _remember(body: bytes, end: int, header: dict[str, Any], tensors: dict[str, Array]) -> None:
    """Remembers what the library found in a header: before as many bytes, the same header means the same."""
    starts = {name: header[name]["data_offsets"][0] for name in tensors}
    aligned = end % 8 == 0 and all(one.size and starts[name] % one.itemsize == 0 for name, one in tensors.items())
    if end > _KNOWN_HEADER_BYTES or "__metadata__" in header or not aligned:
        return
    if len(_known_headers) >= _KNOWN_HEADERS:
        del _known_headers[next(iter(_known_headers))]
    _known_headers[body[:end], len(body)] = [
        (name, one.dtype, one.size, starts[name], one.shape) for name, one in tensors.items()
    ]


def write(model: Model, outputs: list[Array], every_output: bool, states: list[dict[str, Array]] | None) -> bytes:
    """Encodes `y`: `[sequences, *outputs]`, or, for all time steps, `[sum of lengths, *outputs]` with `lengths`.

    Several outputs have their own names in place of y.
    """
    return b"".join(write_parts(model, outputs, every_output, states))


def write_parts(
    model: Model, outputs: list[Array], every_output: bool, states: list[dict[str, Array]] | None
) -> Iterator[bytes]:
    """Encodes as `write` does, in parts and without copies of the whole."""
    tensors: dict[str, list[Array]] = {}
    if every_output:
        tensors["lengths"] = [np.array([len(y) for y in outputs], np.int64)]
    for name in model.reader.states_spec if states else ():
        tensors[name] = [np.stack([state[name] for state in states or ()])]
    for name in model.outputs.dtype.names or ("y",):
        tensors[name] = outputs if model.outputs.dtype.names is None else [y[name] for y in outputs]
    header: dict[str, Any] = {"__metadata__": {"model": model.name, "version": str(model.version)}}
    start = 0
    for name, parts in sorted(tensors.items(), key=lambda one: -one[1][0].itemsize):  # so that each is aligned
        end = start + sum(part.nbytes for part in parts)
        shape = [sum(map(len, parts)), *parts[0].shape[1:]]
        header[name] = {"dtype": _KINDS[parts[0].dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    head = orjson.dumps(header)
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for name in list(header)[1:]:
        for part in tensors[name]:
            yield from byte_parts(part)


def _states(tensors: dict[str, Array], model: Model, count: int) -> list[dict[str, Array] | None]:
    specs = model.reader.states_spec
    for name, spec in specs.items():
        if name not in tensors:
            raise InvalidInput(f"{name}: missing: send all of the model's states or none", place=name)
        tensors[name] = _checked(tensors[name], spec, name)
        if tensors[name].shape != (count, *spec.shape):
            raise InvalidInput(f"{name}: its shape is {_told(tensors[name])}: send {[count, *spec.shape]}", place=name)
    return [{name: tensors[name][row, ...] for name in specs} for row in range(count)]


def _checked(tensor: Array, spec: TensorSpec | StateSpec, name: str) -> Array:
    if spec.dtype == "float32" and tensor.dtype != np.float32:
        raise InvalidInput(f"{name}: its type is {tensor.dtype}: send float32", place=name)
    if spec.dtype != "float32" and tensor.dtype.kind not in "iu":
        raise InvalidInput(f"{name}: its type is {tensor.dtype}: send {spec.dtype}", place=name)
    return validate(tensor, spec, name)


def _told(tensor: Array) -> str:
    return excerpt(str(list(tensor.shape)))


def _words(*shape: int | str) -> str:
    return f"[{', '.join(map(str, shape))}]"
