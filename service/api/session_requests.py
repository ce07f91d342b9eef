"""Creating, stepping and forking sessions as clients ask for it, shared by the HTTP and WebSocket surfaces."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
from numpy.typing import NDArray

from cellserve.service.api.step_codec import wants_all_outputs
from cellserve.service.context import ServiceContext
from cellserve.service.errors import InvalidInput, excerpt
from cellserve.service.idempotency import IdempotencyKey, creation_digest, hashed, step_key
from cellserve.service.sessions.session import Session
from cellserve.service.validation.json_bodies import Position
from cellserve.service.validation.json_input import TensorDecoder

Array = NDArray[Any]

_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._~-]{1,128}")  # clients resolve . and .. in paths


class ForkRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /sessions/{id}/fork`."""

    session: str | None = None
    position: Position | None = None


def validate_session_id(session_id: str) -> None:
    """Raises InvalidInput if a client's session id is not allowed."""
    if not _ID.fullmatch(session_id):
        raise InvalidInput(
            f"session: {excerpt(session_id)!r} cannot be an id: "
            f"send 1 to 128 letters, digits, '-', '.', '_' or '~' (a UUID, say), but not . or ..",
            place="session",
        )


async def create_session(
    service: ServiceContext,
    owner: str,
    model: str | None,
    read_states: Callable[[TensorDecoder], Awaitable[dict[str, Array] | None]],
    session_id: str | None = None,
) -> tuple[Session, bool]:
    """Creates a session of a model, with the states that a function of its decoder reads; says whether it is new."""
    if session_id is not None:
        validate_session_id(session_id)
    engine = await service.engine_when_loaded(model)
    engine.model.check_steppable()
    states = await read_states(engine.model.reader)
    digest = b""
    if session_id is not None:
        # Without a version in it, the digest of a repeated request is the same after a newer version was loaded.
        named = model if model is not None and ":" in model else engine.model.name
        digest = await hashed(states, partial(creation_digest, named, states))
    return await service.sessions.create(engine, states, owner, session_id, digest)


async def fork_session(service: ServiceContext, session: Session, request: ForkRequest) -> tuple[Session, bool]:
    """Creates a session with another one's state and position; also returns whether it is new."""
    if request.session is not None:
        validate_session_id(request.session)
    digest = hashlib.sha256(f"fork {session.id} {request.position}".encode()).digest()
    return await service.sessions.fork(session, request.session, digest, request.position)


async def step_options(
    session: Session, x: Array, single: bool, outputs: str | None, position: int | None
) -> tuple[bool, IdempotencyKey | None]:
    """Returns whether the outputs of all time steps are requested, and the step's key if it has a position."""
    every_output = single or wants_all_outputs(session, outputs)
    key = None if position is None else await hashed(x, partial(step_key, position, x, every_output))
    return every_output, key
