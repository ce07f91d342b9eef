"""The protocol of a session store: what the writer and the surfaces ask of wherever sessions are kept."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.scheduler import Moved
from cellserve.service.errors import Problem
from cellserve.service.idempotency import Request
from cellserve.service.sessions.session import Durable, Listed, Session
from cellserve.service.sessions.table import SessionTable
from cellserve.service.settings import WhenFull

Array = NDArray[Any]
States = dict[str, Array]
Page = tuple[int, int]  # a cursor: of two numbers, whose meaning is the store's


class StoreUnusable(Exception):
    """What was given as the store cannot be one; the message says why."""


class SessionStore(Protocol):
    """Keeps sessions. Each that is in use has a slot in the table, which is the store itself or a cache of it.

    A store that several processes share finds out that a slot is stale when it commits, and raises or notes `Stale`;
    the writer then starts again from `find`. Methods that are not `async` are called on every step and do no I/O that
    takes longer than microseconds.
    """

    table: SessionTable
    durable: Durable
    max_sessions: int
    when_full: WhenFull
    created: int  # sessions made, so far
    ended: dict[str, int]  # sessions ended, so far, by reason

    @property
    def errors(self) -> int:
        """Calls that were not answered, so far."""

    async def start(self) -> None:
        """Looks the store over."""

    async def close(self) -> None:
        """Closes it."""

    async def count(self) -> int:
        """Counts the live sessions; raises StoreAway."""

    def get(self, owner: str, session_id: str) -> Session:
        """Returns a session that has a slot; raises `missing` otherwise."""

    async def find(self, owner: str, session_id: str) -> Session:
        """Returns a session, and gives it a slot where it has none.

        Raises:
            UnknownSession: The owner has none of that id.
            SessionGone: It was deleted, has expired or was evicted.
            ModelVersionNotHere: Its version of its model is not served here.
        """

    def missing(self, owner: str, session_id: str) -> Problem:
        """Makes the error for a session that has no slot: why it has ended, or Stale where it may be elsewhere."""

    def is_current(self, session: Session, key: Request | None) -> bool:
        """Tells whether a change may start from what is in the session's slot, without a refresh."""

    def all_current(self, sessions: Sequence[Session]) -> bool:
        """Tells whether `is_current` holds for all of these sessions, for changes without a key."""

    async def refresh(self, session: Session, key: Request | None) -> None:
        """Makes sure that a locked session's slot holds what the store does, as far as a change with this key needs it.

        Raises:
            SessionWentBack: The store has lost changes that it had acknowledged.
            SessionGone, UnknownSession, Stale: It is not there any more.
        """

    def commit(self, engine: Engine, batch: Sequence[Moved]) -> Awaitable[None] | None:
        """Starts writing what advances of locked sessions have come to; None where nothing has to be waited for.

        Rows that are refused are noted in their advance's `problems`.
        """

    async def write_state(self, session: Session, states: States | None, key: Request | None, moves: int,
                          before: States | None) -> None:  # fmt: skip
        """Sets a locked session's states, and records the change.

        Args:
            session: The session.
            states: By name; None for zeros.
            key: Of the change.
            moves: By how much it moves the position.
            before: The states before it, where a repetition is computed from them.

        Raises:
            Stale: The store holds another state by now.
        """

    async def read_state(self, session: Session) -> tuple[States, int]:
        """Returns a session's states and its position."""

    async def create(self, engine: Engine, states: States | None, owner: str, session_id: str | None, origin: bytes,
                     position: int = 0) -> tuple[Session, bool]:  # fmt: skip
        """Makes a session.

        Args:
            engine: Of the model.
            states: By name; None for zeros.
            owner: Whose it is.
            session_id: Where the client chooses it; then the call may be repeated.
            origin: Digest of the request, where the client chooses the id.
            position: To begin at.

        Returns:
            The session, and whether it was made by this call.

        Raises:
            SessionExists: There is one of that id, which another request has made.
            SessionGone: There was one of that id.
            ServerFull: There are as many sessions as may be.
        """

    async def recreate(self, engine: Engine, owner: str, session_id: str, origin: bytes) -> Session:
        """Makes a session from zeros in place of whatever is or was there under its id; raises as `create` does.

        Whoever waits for the lock of the session before learns that it was deleted.
        """

    async def fork(self, session: Session, new_id: str | None, origin: bytes, position: int | None = None
                   ) -> tuple[Session, bool]:  # fmt: skip
        """Makes a session with the state and the position of another, when those before have had their turn.

        Args:
            session: The other.
            new_id: Where the client chooses it; then the call may be repeated.
            origin: Digest of the request.
            position: Where the other is to be.

        Raises:
            SessionExists, ServerFull: As `create` does.
            SessionGone, PositionConflict, SessionWentBack: As a step does.
        """

    async def delete(self, owner: str, session_id: str, position: int | None = None) -> None:
        """Deletes a session when those before have had their turn; a repeated call changes nothing.

        Raises:
            UnknownSession: None of that id is known.
            SessionGone: It had ended for another reason.
            PositionConflict, SessionWentBack: It is not at the position that was given.
        """

    async def page(self, owner: str, after: Page, limit: int) -> tuple[list[Listed], Page | None]:
        """Returns some of an owner's sessions, and the cursor of the next page, if there is one."""

    def sweep(self) -> None:
        """Ends what has been idle for too long, and forgets old tombstones."""
