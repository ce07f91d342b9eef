"""A session: a position and a state, kept by the server under an id, bound to one version of one model."""

from __future__ import annotations

import math
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.state_arena import Slots
from cellserve.service.errors import ServerFull, SessionGone, UnknownSession
from cellserve.service.idempotency import AppliedChange
from cellserve.service.model_repository.model import Model

# The address of the client whose request is handled, as `api.client_identity` tells it.
peer: ContextVar[str] = ContextVar("peer", default="")

LONGEST_ID = 64 + 1 + 128  # of a sequence: its model's name, a tilde, and what its client calls it
Durable = Literal["none", "process", "disk", "store"]  # how sessions outlive the process


@dataclass(slots=True, eq=False)
class Session:
    """One session; its position and state are in its slot. Its changes run one at a time, in order of arrival."""

    owner: str  # owner of the API key that created it; empty if no keys are required
    id: str
    engine: Engine
    slot: int
    slots: Slots  # `slot` as a length-1 index array, to save allocating it per step
    creation_digest: bytes  # digest of the request that created it, if the client chose its id
    number: int = 0  # its place in the table, which no other session of this process ever has
    alive: bool = True
    applied: AppliedChange | None = None  # the last change with a position
    created_at: float = field(default_factory=time.time)  # seconds since the epoch
    # The stamp, in a shared store, of the state in the slot. None if the slot does not hold a committed state: it must
    # be read again before it is used.
    stamp: bytes | None = None
    deadline_indexed_at: float = -math.inf  # when its deadline in a shared store was last updated, in seconds
    key: str = field(init=False)  # among the sessions of all owners
    client: str = field(init=False)  # whose work its steps are: its owner, without keys who made or fetched it here

    def __post_init__(self) -> None:
        self.key, self.client = key_of(self.owner, self.id), current_client(self.owner)

    @property
    def model(self) -> Model:
        """The model version that it started with and stays on."""
        return self.engine.model

    @property
    def position(self) -> int:
        """Its number of changes: each time step counts as one, and so does each other change."""
        return int(self.engine.arena.position[self.slot])


class ClientLimits(NamedTuple):
    """What the live sessions of one client may amount to."""

    sessions: int
    state_bytes: int

    def error(self) -> ServerFull:
        """Builds the error for a client that has as many."""
        return ServerFull(
            f"a client may have {self.sessions} live sessions, with states of {self.state_bytes} bytes: delete some of "
            f"yours first"
        )


NO_LIMITS = ClientLimits(2**53, 2**53)


class Room(NamedTuple):
    """What a store may hold with a client's new session."""

    max_sessions: int
    client: str
    client_limits: ClientLimits


class SessionSummary(NamedTuple):
    """One session in a list of sessions."""

    id: str
    model: str
    version: int
    position: int
    created_at: float  # seconds since the epoch


def current_client(owner: str) -> str:
    """Returns the client whose request is handled: its key's owner, or where no keys are required, its address."""
    return owner or peer.get()


def key_of(owner: str, session_id: str) -> str:
    """Returns the key of a session among those of all owners; neither owners' names nor ids contain a slash.

    Raises:
        UnknownSession: No session has such an id: stores, and what they remember by key, are not asked for it.
    """
    if len(session_id) > LONGEST_ID or "/" in session_id:
        raise unknown_session_error()
    return f"{owner}/{session_id}" if owner else session_id


def time_text(seconds: float) -> str:
    """Returns a time, in seconds since the epoch, as RFC 3339 writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def unknown_session_error() -> UnknownSession:
    """Builds the error for an id that no session ever had."""
    return UnknownSession("there is no session of that id: create one with POST /sessions")


def session_gone_error(reason: str, position: int) -> SessionGone:
    """Builds the error for a session that has ended."""
    what, advice = {
        "deleted": ("was deleted", "create another"),
        "expired": ("expired", "create another and use it more often"),
        "evicted": ("was evicted to make room", "create another"),
    }[reason]
    return SessionGone(f"the session {what} at position {position}: {advice}", reason=reason, position=position)
