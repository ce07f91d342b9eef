"""The header of a safetensors document, checked for what the library lets pass: names that stand in it twice."""

from __future__ import annotations

import json
from typing import Any

LARGEST_HEADER = 256 * 1024  # bytes; a model's tensors need about 100 each


class BadHeader(ValueError):
    """The header is too large, or a name stands in it twice; the message says which."""


def check_size(content: bytes) -> None:
    """Raises BadHeader if the header is too large to be read at once."""
    size = int.from_bytes(content[:8], "little")
    if size > LARGEST_HEADER:
        raise BadHeader(f"the header has {size} bytes, more than {LARGEST_HEADER}")


def read_header(content: bytes) -> dict[str, Any]:
    """Returns the header of a document that safetensors has parsed; raises BadHeader if a name stands in it twice."""
    size = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + size], object_pairs_hook=_unique)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BadHeader(f"the name {twice[:80]!r} stands twice in the header")
    return found
