"""The binary frames of `WS /stream`: steps of many sessions in one; `docs/reference/protocol.md` specifies them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.state_arena import Slots
from cellserve.service.errors import InvalidInput
from cellserve.service.model_repository.model import Model
from cellserve.service.sessions.pending_steps import BatchStepResult
from cellserve.service.sessions.session import Session
from cellserve.service.validation.tensor_values import validate_together

Array = NDArray[Any]

_HEADER = struct.Struct("<4I")  # kind, ref, number of sessions, time steps; everything is little-endian
_ROW_BYTES = 12  # position and status of a row in an answer
STEP, STEP_FROM = 1, 2
_ANSWER = 0x80  # added to a frame's kind, this is its answer's kind
_REPLAYED = 1  # the status of a replayed row


class Frame(NamedTuple):
    """A step of many sessions, parsed except for x."""

    kind: int
    ref: int
    steps: int  # time steps per session
    handles: NDArray[np.uint32]  # [sessions]
    positions: NDArray[np.uint64] | None  # [sessions], required positions before the step
    body: bytes
    start: int  # offset of x in the body

    @classmethod
    def read(cls, body: bytes) -> Frame:
        """Parses a frame; raises InvalidInput if it is malformed."""
        if len(body) < _HEADER.size:
            raise InvalidInput(f"the frame has {len(body)} bytes: the header alone needs {_HEADER.size}")
        kind, ref, count, steps = _HEADER.unpack_from(body)
        if kind not in (STEP, STEP_FROM):
            raise InvalidInput(f"kind: {kind} is unknown: send {STEP} to step, {STEP_FROM} to step from positions")
        if not count or not steps:
            raise InvalidInput(f"the frame has {count} sessions and {steps} time steps: send at least one of each")
        behind = _HEADER.size + 4 * count
        start = behind + 8 * count if kind == STEP_FROM else behind
        if len(body) < start:
            raise InvalidInput(f"the frame has {len(body)} bytes: {count} handles (and positions) alone need {start}")
        handles = np.frombuffer(body, "<u4", count, _HEADER.size)
        positions = np.frombuffer(body, "<u8", count, behind) if kind == STEP_FROM else None
        return cls(kind, ref, steps, handles, positions, body, start)

    def answer_bytes(self, model: Model) -> int:
        """Returns the size of the answer."""
        return _HEADER.size + len(self.handles) * (_ROW_BYTES + self.steps * model.outputs.step_bytes)

    def x(self, model: Model) -> Array:
        """Returns x `[sessions, time, *features]`; raises InvalidInput if its size or a value is wrong."""
        inputs, count, steps, start = model.inputs, len(self.handles), self.steps, self.start
        size = math.prod(inputs.shape) * inputs.frame_dtype.itemsize
        expected = start + count * steps * size  # Python integers: no header makes them overflow
        if len(self.body) != expected:
            raise InvalidInput(
                f"the frame has {len(self.body)} bytes: x, {count} sessions by {steps} time steps of {size} bytes, "
                f"makes it {expected}"
            )
        x = np.frombuffer(self.body, inputs.frame_dtype, offset=start).reshape(count, steps, *inputs.shape)
        return validate_together(x, inputs, "x")


@dataclass(slots=True, eq=False)
class Group:
    """The sessions of a binary frame."""

    sessions: list[Session]
    slots: Slots
    mixed: bool = False  # whether their models are of several versions
    endings: int = -1  # the table's count of ended sessions when all of these were last seen alive

    @classmethod
    def of(cls, sessions: list[Session]) -> Group:
        """Groups sessions; raises InvalidInput unless they share a model and its inputs and outputs."""
        engines = {session.engine for session in sessions}
        signatures = [engine.model.document.signature for engine in engines]
        alike = {engine.model.name for engine in engines}, {(one.inputs, one.outputs) for one in signatures}
        if any(len(kinds) > 1 for kinds in alike):
            raise InvalidInput(
                "the sessions are of several models, or versions with unlike inputs or outputs: send a frame for each"
            )
        return cls(sessions, np.array([session.slot for session in sessions]), len(engines) > 1)


def answer(kind: int, ref: int, stepped: BatchStepResult) -> bytes:
    """Returns the answer to a frame."""
    y = stepped.y
    statuses = np.zeros(len(y), "<u4")
    if stepped.replayed:
        statuses[list(stepped.replayed)] = _REPLAYED
    for row, problem in stepped.problems.items():
        statuses[row] = problem.status
    header, positions = _HEADER.pack(kind | _ANSWER, ref, *y.shape[:2]), stepped.positions.astype("<u8")
    return b"".join((header, positions, statuses, np.ascontiguousarray(y)))  # type: ignore[arg-type]


def ref_of(body: bytes) -> int | None:
    """Returns the ref of a malformed frame, None if it is too short."""
    return int(_HEADER.unpack_from(body)[1]) if len(body) >= _HEADER.size else None
