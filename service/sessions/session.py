"""A session: a position and a state, held by the server under an id, bound to one version of one model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.state_arena import Slots
from cellserve.service.errors import SessionGone, UnknownSession
from cellserve.service.idempotency import Applied
from cellserve.service.model_repository.repository import Model

Durable = Literal["none", "snapshot", "store"]  # what outlives the process


@dataclass(slots=True, eq=False)
class Session:
    """One session; its position and its state are in the slot. Its changes come one by one, in order of arrival."""

    owner: str  # whose key made it; empty where nobody needs a key
    id: str
    engine: Engine
    slot: int
    slots: Slots  # `slot` as an array of length 1, as the engine takes it
    origin: bytes  # digest of the request that made it, where its id was chosen by the client
    alive: bool = True
    applied: Applied | None = None  # the last change with a position
    revision: bytes | None = None  # in a shared store, of what is in the slot; without one it must be read again
    indexed: float = -math.inf  # when its deadline was last moved in a shared store, seconds

    @property
    def model(self) -> Model:
        """The version of the model that it began with and stays on."""
        return self.engine.model

    @property
    def position(self) -> int:
        """Counts what has changed it: its steps by their number, all else by one."""
        return int(self.engine.arena.position[self.slot])


class Listed(NamedTuple):
    """One session in a list of sessions."""

    id: str
    model: str
    version: int
    position: int


def key_of(owner: str, session_id: str) -> str:
    """Names a session among those of all owners; no owner's name has a slash in it."""
    return f"{owner}/{session_id}" if owner else session_id


def unknown() -> UnknownSession:
    """Makes the error for an id that no session ever had."""
    return UnknownSession("there is no session of that id: create one with POST /sessions")


def gone(reason: str, position: int) -> SessionGone:
    """Makes the error for a session that has ended."""
    what, advice = {
        "deleted": ("was deleted", "create another"),
        "expired": ("expired", "create another, use it more often"),
        "evicted": ("was evicted to make room", "create another"),
    }[reason]
    return SessionGone(f"the session {what} at position {position}: {advice}", reason=reason, position=position)
