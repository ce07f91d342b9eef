"""The binary frames of `WS /stream`: steps of many sessions in one; `docs/protocol.md` has them to the byte."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.state_arena import Slots
from cellserve.service.errors import InvalidInput
from cellserve.service.model_repository.repository import Model
from cellserve.service.sessions.pending import BatchStepResult
from cellserve.service.sessions.session import Session
from cellserve.service.validation.tensor_values import validate_together

Array = NDArray[Any]

_HEADER = struct.Struct("<4I")  # kind, ref, number of sessions, time steps; all that follows is little-endian too
STEP, STEP_FROM = 1, 2
_STEPPED = 0x80  # and the kind of what is answered
_REPLAYED = 1  # a status


class Frame(NamedTuple):
    """A step of many sessions, read up to its numbers."""

    kind: int
    ref: int
    steps: int  # time steps of each session
    handles: NDArray[np.uint32]  # [sessions]
    positions: NDArray[np.uint64] | None  # [sessions], where they are to start from
    body: bytes
    start: int  # of x in the body

    @classmethod
    def read(cls, body: bytes) -> Frame:
        """Reads a frame; raises InvalidInput where it cannot be one."""
        if len(body) < _HEADER.size:
            raise InvalidInput(f"the frame has {len(body)} bytes: its header alone has {_HEADER.size}")
        kind, ref, count, steps = _HEADER.unpack_from(body)
        if kind not in (STEP, STEP_FROM):
            raise InvalidInput(f"kind: {kind} is none: send {STEP} to step, {STEP_FROM} to step from positions")
        if not count or not steps:
            raise InvalidInput(f"the frame has {count} sessions and {steps} time steps: send at least one of each")
        behind = _HEADER.size + 4 * count
        start = behind + 8 * count if kind == STEP_FROM else behind
        if len(body) < start:
            raise InvalidInput(f"the frame has {len(body)} bytes: {count} handles (and positions) alone need {start}")
        handles = np.frombuffer(body, "<u4", count, _HEADER.size)
        positions = np.frombuffer(body, "<u8", count, behind) if kind == STEP_FROM else None
        return cls(kind, ref, steps, handles, positions, body, start)

    def x(self, model: Model) -> Array:
        """Gives `[sessions, time, *features]`, checked; raises InvalidInput where it does not fit."""
        inputs, count, steps, start = model.inputs, len(self.handles), self.steps, self.start
        size = math.prod(inputs.shape) * inputs.frame_dtype.itemsize
        whole = start + count * steps * size  # of Python's integers, which no header makes overflow
        if len(self.body) != whole:
            raise InvalidInput(
                f"the frame has {len(self.body)} bytes: x, {count} sessions by {steps} time steps of {size} bytes, "
                f"makes it {whole}"
            )
        x = np.frombuffer(self.body, inputs.frame_dtype, offset=start).reshape(count, steps, *inputs.shape)
        return validate_together(x, inputs, "x")


@dataclass(slots=True, eq=False)
class Group:
    """Sessions that stand in a binary frame together."""

    sessions: list[Session]
    slots: Slots
    mixed: bool = False  # whether they are of several versions
    endings: int = -1  # how many sessions had ended when all of these were seen alive

    @classmethod
    def of(cls, sessions: list[Session]) -> Group:
        """Groups sessions; raises InvalidInput where they are not of one model, or of versions with other tensors."""
        engines = {session.engine for session in sessions}
        signatures = [engine.model.document.signature for engine in engines]
        alike = {engine.model.name for engine in engines}, {(one.inputs, one.outputs) for one in signatures}
        if any(len(kinds) > 1 for kinds in alike):
            raise InvalidInput(
                "the sessions are of several models, or of versions with other inputs or outputs: send a frame for each"
            )
        return cls(sessions, np.array([session.slot for session in sessions]), len(engines) > 1)


def answer(kind: int, ref: int, stepped: BatchStepResult) -> bytes:
    """Writes the answer to a frame."""
    y = stepped.y
    statuses = np.zeros(len(y), "<u4")
    statuses[list(stepped.replayed)] = _REPLAYED
    for row, problem in stepped.problems.items():
        statuses[row] = problem.status
    parts = _HEADER.pack(kind | _STEPPED, ref, *y.shape[:2]), stepped.positions.astype("<u8"), statuses, y
    return b"".join([bytes(part) for part in parts])


def ref_of(body: bytes) -> int | None:
    """Gives the ref of a frame that did not fit, as far as it can be read."""
    return int(_HEADER.unpack_from(body)[1]) if len(body) >= _HEADER.size else None
