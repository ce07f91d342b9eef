"""Exactly once: a change may say the position that it starts from, and its repetition is told the same answer again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.service.errors import PositionConflict, SessionWentBack

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Request:
    """A change of a session that says where it starts."""

    position: int
    digest: bytes  # SHA-256 over the operation, its position, tensors and options: the same on whatever surface


@dataclass(frozen=True, slots=True)
class Applied:
    """The last change with a position that a session has seen, and what its repetition is told."""

    request: Request
    reached: int  # the position after it
    y: Array | None = None  # [time, *outputs] of a step
    # Where y would be large, and of a rollout: the states before it, from which bit identity computes the same again.
    before: dict[str, Array] | None = None


def step_request(position: int, x: Array, every_output: bool) -> Request:
    """Makes the request of a step by x `[time, *features]`, whose outputs of all time steps are wanted or the last."""
    every_output = every_output or len(x) == 1
    return _request(b"step", position, b"%d %d" % (len(x), every_output), np.ascontiguousarray(x).tobytes())


def rollout_request(position: int, x: Array, options: bytes) -> Request:
    """Makes the request of a rollout that begins with x `[time, *features]`."""
    return _request(b"rollout", position, options, np.ascontiguousarray(x).tobytes())


def state_request(position: int, states: dict[str, Array] | None) -> Request:
    """Makes the request of a change of the state itself; None is a reset."""
    return _request(b"state", position, states_digest(states))


def creation(model: str, states: dict[str, Array] | None) -> bytes:
    """Gives the digest of a request that makes a session of a model, from zeros or from given states."""
    return hashlib.sha256(b"create %b %b" % (model.encode(), states_digest(states))).digest()


def states_digest(states: dict[str, Array] | None) -> bytes:
    """Gives a SHA-256 of states."""
    digest = hashlib.sha256()
    for name, state in sorted((states or {}).items()):
        digest.update(b"%b %d " % (name.encode(), state.nbytes))
        digest.update(np.ascontiguousarray(state).data)
    return digest.digest() if states is not None else b""


def check(position: int, last: Applied | None, request: Request) -> Applied | None:
    """Says what to do with a request to a session at a position.

    Returns:
        None where it is to be applied; what to answer again where it is a repetition of the last change.

    Raises:
        PositionConflict: The session has gone on, by another request.
        SessionWentBack: The client has seen the session further on than it is.
    """
    if request.position == position:
        return None
    if last is not None and last.reached == position and last.request == request:
        return last
    if request.position > position:
        raise SessionWentBack(
            f"position: the session is at {position}, behind the {request.position} that was sent: its store has lost "
            f"acknowledged changes (a restart without a snapshot, a failover), or the position was never reached: "
            f"send the steps from {position} on again",
            position=position,
        )
    raise PositionConflict(
        f"position: the session is at {position}, not at {request.position}, and its last change was another request "
        f"than this one: it has been applied before, or someone else moves the session: go on from {position}",
        position=position,
    )


def _request(operation: bytes, position: int, *parts: bytes) -> Request:
    return Request(position, hashlib.sha256(b"%b %d " % (operation, position) + b" ".join(parts)).digest())
