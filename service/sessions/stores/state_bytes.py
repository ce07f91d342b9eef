"""The states of one session as bytes: one state after the other, in the order of the model's signature."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import StateSpec

Array = NDArray[Any]


def pack_states(specs: Iterable[StateSpec], states: dict[str, Array] | None) -> bytes:
    """Encodes a session's states; None for zeros."""
    parts = (np.zeros(spec.shape, spec.dtype) if states is None else states[spec.name] for spec in specs)
    return b"".join(part.tobytes() for part in parts)


def unpack_states(specs: Iterable[StateSpec], content: bytes) -> dict[str, Array]:
    """Decodes what `pack_states` encodes; raises ValueError if it is none, or if a number is not finite."""
    states, start = {}, 0
    for spec in specs:
        size = int(np.prod(spec.shape))
        state = np.frombuffer(content, spec.dtype, size, start).reshape(spec.shape)
        if state.dtype.kind == "f" and not np.isfinite(state).all():
            raise ValueError
        states[spec.name] = state
        start += state.nbytes
    if start != len(content):
        raise ValueError
    return states
