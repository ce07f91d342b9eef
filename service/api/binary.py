"""`POST /predict` in safetensors (https://github.com/huggingface/safetensors, "Format"): tensors without JSON."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import parse_qsl

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from service.errors import InvalidInput, NotSafetensors
from service.repository import Model

Array = NDArray[Any]

_DTYPES = {"F32": "<f4", "I32": "<i4", "I64": "<i8", "U32": "<u4", "U64": "<u8", "I16": "<i2", "U16": "<u2", "I8": "i1",
           "U8": "u1", "F16": "<f2", "F64": "<f8"}  # fmt: skip
MEDIA_TYPES = (b"application/x-safetensors", b"application/octet-stream")


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """The query of a prediction in safetensors."""

    model: str | None = None
    outputs: Literal["last", "all"] | None = None
    return_states: bool = False


def read_options(query: bytes) -> Options:
    """Reads the query; raises InvalidInput where it has something else in it."""
    try:
        given = dict(parse_qsl(query.decode(), keep_blank_values=True, strict_parsing=bool(query)))
        return msgspec.convert(given, Options, strict=False)
    except (ValueError, msgspec.ValidationError) as error:
        raise InvalidInput(f"the query: {error}: send model, outputs (last or all), return_states (true)") from None


def read(body: bytes, model: Model) -> tuple[list[Array], list[dict[str, Array] | None] | None]:
    """Reads the tensors of a prediction.

    `x` is `[sequences, time, *features]`, or, with `lengths [sequences]`, all time steps one sequence after the other,
    `[sum of lengths, *features]`. The model's states, each `[sequences, *shape]`, may be given to start from.

    Returns:
        The sequences, each `[time, *features]`, and the states of each where they are given.

    Raises:
        NotSafetensors: It cannot be parsed.
        InvalidInput: A tensor is missing or does not fit.
    """
    tensors = _load(body)
    known = {"x", "lengths"} | model.reader.states_spec.keys()
    if tensors.keys() - known or "x" not in tensors:
        raise InvalidInput(
            f"there are the tensors {sorted(tensors)}: send x, and of {sorted(known - {'x'})} what you need"
        )
    x, shape = tensors["x"], model.reader.spec.shape
    _check(x, "x")
    lengths = tensors.get("lengths")
    if lengths is None:
        if x.ndim != 2 + len(shape) or x.shape[2:] != shape or not x.size:
            raise InvalidInput(
                f"x: its shape is {list(x.shape)}: send [sequences, time, {_words(shape)}], "
                f"or [time steps, {_words(shape)}] with lengths",
                place="x",
            )
        sequences = list(x)
    else:
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not lengths.size or (lengths < 1).any():
            raise InvalidInput("lengths: send one integer a sequence, each at least 1", place="lengths")
        if x.shape != (int(lengths.sum()), *shape):
            raise InvalidInput(
                f"x: its shape is {list(x.shape)}, lengths ask for [{int(lengths.sum())}, {_words(shape)}]", place="x"
            )
        ends = np.cumsum(lengths).tolist()
        sequences = [x[start:end] for start, end in zip((0, *ends), ends, strict=False)]
    given = tensors.keys() & model.reader.states_spec.keys()
    return sequences, _states(tensors, model, len(sequences)) if given else None


def write_states(model: Model, states: dict[str, Array], told: dict[str, str]) -> bytes:
    """Writes one session's states, each `[*shape]`, with what is told of them in the metadata."""
    return save(states, {"model": model.name, "version": str(model.version), **told})


def read_states(body: bytes, model: Model) -> tuple[dict[str, Array], dict[str, Any]]:
    """Reads one session's states, each `[*shape]`, and what the metadata tell of them.

    Raises:
        NotSafetensors: It cannot be parsed.
        InvalidInput: The tensors are not the model's states: their names, shapes, types, or a number is not finite.
    """
    tensors, specs = _load(body), model.reader.states_spec
    if tensors.keys() != specs.keys():
        raise InvalidInput(f"there are the tensors {sorted(tensors)}: send the model's states, {sorted(specs)}")
    for name, tensor in tensors.items():
        _check(tensor, name)
        if tensor.shape != specs[name].shape:
            raise InvalidInput(f"{name}: its shape is {list(tensor.shape)}: send {list(specs[name].shape)}", place=name)
    # The format's header: its length, then JSON; whoever parsed the tensors has checked both.
    told = orjson.loads(body[8 : 8 + int.from_bytes(body[:8], "little")]).get("__metadata__") or {}
    return tensors, told


def _load(body: bytes) -> dict[str, Array]:
    """Does what safetensors.numpy.load does, for the types that are taken here, in a third of its time."""
    try:
        return {
            name: np.frombuffer(told["data"], _DTYPES[told["dtype"]]).reshape(told["shape"])
            for name, told in deserialize(body)  # type: ignore[no-untyped-call]
        }
    except KeyError as error:
        raise InvalidInput(f"there is a tensor of type {error}: send one of {', '.join(_DTYPES)}") from None
    except (SafetensorError, ValueError) as error:
        raise NotSafetensors(f"{error}: send what safetensors.numpy.save gives") from None


def write(model: Model, outputs: list[Array], every_output: bool, states: list[dict[str, Array]] | None) -> bytes:
    """Writes `y`: `[sequences, *outputs]`, or, of all time steps, `[sum of lengths, *outputs]` with `lengths`."""
    tensors = {"y": np.concatenate(outputs)}
    if every_output:
        tensors["lengths"] = np.array([len(y) for y in outputs], np.int64)
    for name in model.reader.states_spec if states else ():
        tensors[name] = np.stack([state[name] for state in states or ()])
    return save(tensors, {"model": model.name, "version": str(model.version)})


def _states(tensors: dict[str, Array], model: Model, count: int) -> list[dict[str, Array] | None]:
    specs = model.reader.states_spec
    for name, spec in specs.items():
        if name not in tensors:
            raise InvalidInput(f"{name}: missing: send all of the model's states or none", place=name)
        _check(tensors[name], name)
        if tensors[name].shape != (count, *spec.shape):
            shape = list(tensors[name].shape)
            raise InvalidInput(f"{name}: its shape is {shape}: send {[count, *spec.shape]}", place=name)
    return [{name: tensors[name][row] for name in specs} for row in range(count)]


def _check(tensor: Array, name: str) -> None:
    if tensor.dtype != np.float32:
        raise InvalidInput(f"{name}: its type is {tensor.dtype}: send float32", place=name)
    if not np.isfinite(tensor).all():
        place = name + "".join(f"[{number}]" for number in np.argwhere(~np.isfinite(tensor))[0])
        raise InvalidInput(f"{place}: not a finite number", place=place)


def _words(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
