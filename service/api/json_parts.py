"""Large answers in parts, JSON or bytes, so that neither their encoding nor their sending holds up anything else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.types import Receive, Send

from cellserve.service.api.answer_size import LARGE
from cellserve.service.api.asgi import JSON, send_json, send_parts

_PART_BYTES = 256 * 1024
_PART = 16 * 1024  # numbers or other values; orjson writes them in about a millisecond


async def send_sized_json(
    send: Send, receive: Receive, document: dict[str, Any], size: int, more: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Sends a JSON document of about `size` bytes, in parts if it is large; raises ClientGone."""
    if size <= LARGE:
        await send_json(send, document, more)
    else:
        await send_parts(send, receive, [JSON, *more], json_parts(document))


async def encoded(document: dict[str, Any], size: int) -> bytes:
    """Returns a JSON document of about `size` bytes, encoded in parts if it is large."""
    if size <= LARGE:
        return _dumps(document)
    parts = []
    for part in json_parts(document):
        parts.append(part)
        await asyncio.sleep(0)
    return b"".join(parts)


def json_parts(document: Any) -> Iterator[bytes]:
    """Yields a document in parts: dicts, lists, NumPy arrays, and what orjson writes."""
    if isinstance(document, dict) and _weight(document) > _PART:
        before = b"{"
        for name, value in document.items():
            yield before + orjson.dumps(name) + b":"
            yield from json_parts(value)
            before = b","
        yield b"}"
    elif isinstance(document, list | np.ndarray) and _weight(document) > _PART:
        before = b"["
        for part in _runs(document):
            yield before
            if len(part) > 1 or _weight(part[0]) <= _PART:
                yield _dumps(part)[1:-1]
            else:
                yield from json_parts(part[0])
            before = b","
        yield b"]"
    else:
        yield _dumps(document)


def byte_parts(array: NDArray[Any]) -> Iterator[bytes]:
    """Yields an array's bytes, row-major, in parts."""
    if 0 < array.nbytes <= _PART_BYTES:
        yield array.tobytes()
        return
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, len(content), _PART_BYTES):
        yield content[start : start + _PART_BYTES].tobytes()


def _dumps(document: Any) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _weight(value: Any) -> int:
    """Returns about how many values there are in a value."""
    if isinstance(value, np.ndarray):
        return value.size
    if isinstance(value, dict):
        return sum(map(_weight, value.values()))
    if isinstance(value, list):
        # Those of a list are alike, or arrays and dicts of different sizes.
        return len(value) if not value or isinstance(value[0], str | int | float) else sum(map(_weight, value))
    return 1


def _runs(values: list[Any] | np.ndarray) -> Iterator[Any]:
    """Yields consecutive values, as many at a time as make a part, at least one."""
    start = weight = 0
    if isinstance(values, np.ndarray):
        size = max(1, _PART * len(values) // values.size)
        yield from (values[start : start + size] for start in range(0, len(values), size))
        return
    for stop, value in enumerate(values):
        own = _weight(value)
        if weight and weight + own > _PART:
            yield values[start:stop]
            start, weight = stop, 0
        weight += own
    yield values[start:]
