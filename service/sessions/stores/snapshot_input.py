"""What stands in a snapshot, checked as input: its SHA-256 shows damage, not who wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from safetensors.numpy import load

from cellserve.models.signature import StateSpec
from cellserve.service.engine.engine import Engine
from cellserve.service.runtime.tensor_layout import unpack
from cellserve.service.sessions.stores.moment import Moment
from cellserve.service.validation.safetensors_header import read_header
from cellserve.service.validation.tensor_values import validate

Array = NDArray[Any]

_Position = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Owner = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,64}$")]
_Id = Annotated[str, Meta(pattern=r"^[^\x00-\x1f/]+$", max_length=512)]
# Position and digest of the change, position after it, shape of its stored output, whether states before it follow.
Applied = tuple[_Position, _Digest, _Position, list[Annotated[int, Meta(ge=0)]] | None, bool]
SessionRow = tuple[_Owner, _Id, Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")], Applied | None]
Gone = tuple[str, Literal["deleted", "expired", "evicted"], _Position, float]  # key, reason, position, until


class ModelPart(msgspec.Struct):
    """The sessions of one model, and the names of their tensors."""

    model: str
    version: Annotated[int, Meta(ge=1)]
    digest: _Digest
    sessions: list[SessionRow]
    arrays: list[str]


class Index(msgspec.Struct):
    """Everything in a snapshot that is not a tensor."""

    models: list[ModelPart]
    gone: list[Gone]
    written: Moment | None = None  # older files do not say when


def read_document(content: bytes) -> tuple[Index, dict[str, Array]]:
    """Returns the index and the tensors of a snapshot's document; raises ValueError if anything is not as written."""
    tensors: dict[str, Array] = dict(load(content))
    read_header(content)
    index = msgspec.json.decode(tensors.pop("told", np.empty(0, np.uint8)).tobytes(), type=Index)
    expected = {f"{place}/{name}" for place, part in enumerate(index.models) for name in part.arrays}
    if tensors.keys() != expected:
        raise ValueError(f"its tensors are not those that it names: {sorted(tensors.keys() ^ expected)[0]!r}")
    keys = [(owner, name) for part in index.models for owner, name, *_ in part.sessions]
    if len(set(keys)) < len(keys):
        raise ValueError("a session stands in it twice")
    return index, tensors


def check_rows(engine: Engine, rows: list[SessionRow], arrays: Mapping[str, Array]) -> None:
    """Raises ValueError if the tensors of one model's sessions are not such as the model has.

    Args:
        engine: The engine of the model.
        rows: The sessions.
        arrays: The tensors, by name.
    """
    count, specs = len(rows), engine.arena.specs
    position, used = arrays["position"], arrays["used"]
    _check(position, (count,), "<i8", "position")
    _check(used, (count,), "<f8", "used")
    if (position < 0).any() or not np.isfinite(used).all():
        raise ValueError("position or used: a number is out of bounds")
    changes = [applied for *_, applied in rows if applied is not None]
    befores = sum(shape is None and has_before for *_, shape, has_before in changes)
    for spec in specs:
        _check_states(arrays[f"state.{spec.name}"], (count, *spec.shape), spec)
        before = arrays[f"before.{spec.name}"]
        _check_states(before.reshape(befores, *spec.shape), (befores, *spec.shape), spec)
    shapes: Iterable[list[int]] = (shape for *_, shape, _ in changes if shape is not None)
    outputs = engine.model.outputs
    elements = 0
    for shape in shapes:
        if not shape or tuple(shape[1:]) != outputs.shape:
            raise ValueError("answers: an output has another shape than the model's")
        elements += math.prod(shape)
    _check(arrays["answers"], (elements * outputs.dtype.itemsize,), "|u1", "answers")
    for values in unpack(np.frombuffer(arrays["answers"].tobytes(), outputs.dtype)):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError("answers: a number is not finite")


def _check(array: Array, shape: tuple[int, ...], dtype: str, name: str) -> None:
    if array.shape != shape or array.dtype.str != dtype:
        raise ValueError(f"{name}: it is {array.dtype.str}{list(array.shape)}, not {dtype}{list(shape)}")


def _check_states(array: Array, shape: tuple[int, ...], spec: StateSpec) -> None:
    _check(array, shape, np.dtype(spec.dtype).str, spec.name)
    try:
        validate(array, spec, spec.name)
    except Exception as error:
        raise ValueError(str(error)) from None
