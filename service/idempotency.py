"""Idempotency keys: a change of a session may state its starting position; a repetition gets the same answer again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellserve.service.errors import PositionConflict, SessionWentBack

Array = NDArray[Any]
T = TypeVar("T")

HASHED_AT_ONCE = 1024 * 1024  # bytes, which take about a millisecond


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """Identifies a change of a session that states its starting position."""

    position: int
    digest: bytes  # SHA-256 of the operation, position, tensors and options: the same through every API


@dataclass(frozen=True, slots=True)
class AppliedChange:
    """The last change with a position that a session has applied, and what is needed to answer its repetition."""

    key: IdempotencyKey
    position_after: int
    y: Array | None = None  # [time, *outputs] of a step
    # States before the change, if y would be large or the change is a rollout: the answer is computed again from them,
    # bit for bit.
    states_before: dict[str, Array] | None = None


async def hashed(tensors: Array | dict[str, Array] | None, digest: Callable[[], T]) -> T:
    """Returns the digest of tensors; that of large ones is computed in a thread, while the event loop goes on."""
    arrays = tensors.values() if isinstance(tensors, dict) else () if tensors is None else (tensors,)
    if sum(array.nbytes for array in arrays) <= HASHED_AT_ONCE:
        return digest()
    return await asyncio.to_thread(digest)


def step_key(position: int, x: Array, return_all_outputs: bool) -> IdempotencyKey:
    """Returns the key of a step by x `[time, *features]`; of one time step, all outputs and the last are the same."""
    return_all_outputs = return_all_outputs or len(x) == 1
    return _key(b"step", position, b"%d %d" % (len(x), return_all_outputs), x)


def rollout_key(position: int, x: Array, options: bytes) -> IdempotencyKey:
    """Returns the key of a rollout that starts with x `[time, *features]`."""
    return _key(b"rollout", position, options, x)


def state_key(position: int, states: dict[str, Array] | None) -> IdempotencyKey:
    """Returns the key of a state write; None is a reset."""
    return _key(b"state", position, states_digest(states))


def creation_digest(model: str, states: dict[str, Array] | None) -> bytes:
    """Returns the digest of a request that creates a session of a model; None starts it from zeros."""
    return hashlib.sha256(b"create %b %b" % (model.encode(), states_digest(states))).digest()


def states_digest(states: dict[str, Array] | None) -> bytes:
    """Returns the SHA-256 of states; empty for None."""
    digest = hashlib.sha256()
    for name, state in sorted((states or {}).items()):
        digest.update(b"%b %d " % (name.encode(), state.nbytes))
        digest.update(np.ascontiguousarray(state).data)
    return digest.digest() if states is not None else b""


def resolve(position: int, last: AppliedChange | None, key: IdempotencyKey) -> AppliedChange | None:
    """Decides what to do with a change of a session.

    Args:
        position: The session's position.
        last: The last change with a position that it has applied.
        key: The key of the change.

    Returns:
        None if the change is to be applied; the last change if this is its repetition.

    Raises:
        PositionConflict: Another change has moved the session past the key's position.
        SessionWentBack: The session is behind the key's position.
    """
    if key.position == position:
        return None
    if last is not None and last.position_after == position and last.key == key:
        return last
    if key.position > position:
        raise SessionWentBack(
            f"position: the session is at {position}, behind the position {key.position} that was sent. Either its "
            f"store has lost acknowledged changes (a power cut, a failover), or the position was "
            f"never reached: send the steps from {position} again",
            position=position,
        )
    raise PositionConflict(
        f"position: the session is at {position}, not at {key.position}, and its last change was a different request. "
        f"Either this one was applied earlier, or another client changes the session: continue from {position}",
        position=position,
    )


def _key(operation: bytes, position: int, about: bytes, x: Array | None = None) -> IdempotencyKey:
    digest = hashlib.sha256(b"%b %d %b" % (operation, position, about))
    if x is not None:
        digest.update(b" ")
        digest.update(np.ascontiguousarray(x).data)  # not copied: hashlib lets other threads run meanwhile
    return IdempotencyKey(position, digest.digest())
