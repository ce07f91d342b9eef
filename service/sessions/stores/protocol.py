"""The session store protocol: what the writer and the APIs need from wherever sessions are kept."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.stats import Histogram
from cellserve.service.engine.work import Finished
from cellserve.service.errors import Problem
from cellserve.service.idempotency import IdempotencyKey
from cellserve.service.sessions.session import Durable, Room, Session, SessionSummary
from cellserve.service.sessions.stores.records import (
    ConditionalWrites,
    SessionRecord,
    TombstoneRecord,
    UnreadableRecord,
    WriteOutcome,
)
from cellserve.service.sessions.table import SessionTable
from cellserve.service.settings import WhenFull

Array = NDArray[Any]
States = dict[str, Array]
Page = tuple[int, int]  # a cursor; only the store knows what its numbers mean


class StoreUnusable(Exception):
    """The configured store cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class StoreFiles:
    """What a store has on this machine's disk."""

    used_bytes: int  # what holds something
    file_bytes: int  # the files' size, with what was deleted and is kept for reuse
    max_bytes: int  # of the files, at most
    free_bytes: int  # what the disk has left
    readers: int  # of all processes
    checkpoint_age: float | None  # seconds since the last checkpoint; None if none are taken
    sync_seconds: Histogram  # of this process's syncs to disk


class SessionStore(Protocol):
    """Keeps sessions. Those in use have a slot in the table, which is either the store itself or a cache of it.

    A store that several processes share detects a stale slot when it commits, and then raises or records
    `StaleSession`; the writer starts again from `fetch`. Methods that are not `async` are called on every step: they
    do nothing that takes longer than microseconds.
    """

    table: SessionTable
    durable: Durable
    max_sessions: int
    when_full: WhenFull
    created: int  # sessions created so far
    ended: dict[str, int]  # sessions ended so far, by reason

    @property
    def unreadable(self) -> int:
        """Records that were read so far and were not those of a session."""

    @property
    def errors(self) -> Mapping[str, int]:
        """Calls to the store that failed so far, by reason; has all reasons from the start."""

    def files(self) -> StoreFiles | None:
        """Returns what the store has on this machine's disk; None if it keeps nothing there."""

    async def start(self) -> None:
        """Checks the store."""

    async def leave_to_workers(self) -> None:
        """Closes what worker processes open for themselves; `close` is called when they have ended."""

    async def close(self) -> None:
        """Closes the store."""

    async def count(self) -> int:
        """Returns the number of live sessions; raises StoreUnavailable."""

    def get(self, owner: str, session_id: str) -> Session:
        """Returns a session that has a slot; raises `not_found_error` otherwise."""

    async def fetch(self, owner: str, session_id: str) -> Session:
        """Returns a session, after allocating a slot for it if it has none.

        Raises:
            UnknownSession: The owner has no session of that id.
            SessionGone: It was deleted, expired or evicted.
            ModelVersionNotHere: This server does not have the session's model version.
            SessionUnreadable: What the store has of it is not a session.
        """

    def not_found_error(self, owner: str, session_id: str) -> Problem:
        """Returns the error for a session without a slot: how it ended, or StaleSession if it may be elsewhere."""

    def is_current(self, session: Session, key: IdempotencyKey | None) -> bool:
        """Returns whether a change may start from the session's slot without a refresh."""

    def all_current(self, sessions: Sequence[Session]) -> bool:
        """Returns whether `is_current` holds for all of these sessions, for changes without a key."""

    async def refresh(self, session: Session, key: IdempotencyKey | None) -> None:
        """Reloads a locked session from the store, unless a change with this key may start from its slot as it is.

        Raises:
            SessionWentBack: The store has lost acknowledged changes.
            SessionGone, UnknownSession, StaleSession: The session is not in the store any more.
        """

    def commit(self, engine: Engine, batch: Sequence[Finished]) -> Awaitable[None] | None:
        """Starts writing the results of work items of locked sessions; returns None if there is nothing to wait for.

        Rows that are refused are recorded in their item's `errors_by_row`.
        """

    async def write_state(self, session: Session, states: States | None, key: IdempotencyKey | None, moves: int,
                          before: States | None) -> None:  # fmt: skip
        """Writes a locked session's states, and records the change.

        Args:
            session: The session.
            states: The states by name; None for zeros.
            key: The idempotency key of the change, if it states its position.
            moves: How far the change advances the position.
            before: The states before the change, if the answer to a repetition is computed from them.

        Raises:
            StaleSession: The session was changed elsewhere.
        """

    async def read_state(self, session: Session) -> tuple[States, int]:
        """Returns a session's states and position."""

    async def create(self, engine: Engine, states: States | None, owner: str, session_id: str | None,
                     creation_digest: bytes, position: int = 0) -> tuple[Session, bool]:  # fmt: skip
        """Creates a session.

        Args:
            engine: The engine of its model.
            states: The initial states by name; None for zeros.
            owner: The owner of the session.
            session_id: The id, if the client chooses it; the call may then be repeated.
            creation_digest: Digest of the request, if the client chooses the id.
            position: The initial position.

        Returns:
            The session, and whether this call created it.

        Raises:
            SessionExists: Another request has created a session of that id.
            SessionGone: A session of that id has ended.
            ServerFull: The limit on sessions is reached.
        """

    async def recreate(self, engine: Engine, owner: str, session_id: str, creation_digest: bytes) -> Session:
        """Creates a session from zeros, replacing any existing or ended one of that id; raises as `create` does.

        Changes that wait for the lock of the replaced session find that it was deleted.
        """

    async def fork(self, session: Session, new_id: str | None, creation_digest: bytes, position: int | None = None
                   ) -> tuple[Session, bool]:  # fmt: skip
        """Creates a session with the state and position of another, after the earlier changes of that one.

        Args:
            session: The other session.
            new_id: The id, if the client chooses it; the call may then be repeated.
            creation_digest: Digest of the request.
            position: The position at which the other session must be.

        Raises:
            SessionExists, ServerFull: As `create` does.
            SessionGone, PositionConflict, SessionWentBack: As a step does.
        """

    async def delete(self, owner: str, session_id: str, position: int | None = None) -> None:
        """Deletes a session after the changes that came before; a repeated call changes nothing.

        Raises:
            UnknownSession: No session of that id is known.
            SessionGone: It has ended for another reason.
            PositionConflict, SessionWentBack: It is not at the given position.
        """

    async def page(self, owner: str, after: Page, limit: int) -> tuple[list[SessionSummary], Page | None]:
        """Returns a page of an owner's sessions, and the cursor of the next page, if there is one."""

    def sweep(self) -> None:
        """Ends idle sessions, and forgets old tombstones."""


class StoreClient(Protocol):
    """A store that several processes share; keys are those of `key_of`. All methods raise StoreUnavailable.

    What it has is input: a record that is not a session's is an UnreadableRecord, and can be ended or replaced.
    """

    durable: Durable

    @property
    def errors(self) -> Mapping[str, int]:
        """Calls that failed so far, by reason."""

    async def start(self) -> None:
        """Checks the store."""

    async def leave_to_workers(self) -> None:
        """Closes what worker processes open for themselves; `close` is called when they have ended."""

    async def close(self) -> None:
        """Closes the store."""

    async def load(self, key: str) -> SessionRecord | TombstoneRecord | None:
        """Reads a session, or its tombstone, and extends its life; returns None if the key is unknown.

        Raises:
            UnreadableRecord: There is something else under the key.
        """

    async def create(self, key: str, session: SessionRecord, room: Room) -> WriteOutcome:
        """Creates a session: WRITTEN, EXISTS, GONE if it has ended, FULL, or CROWDED by its client."""

    async def replace(self, key: str, session: SessionRecord, room: Room) -> WriteOutcome:
        """Creates a session, replacing any existing or ended one: WRITTEN, or FULL or CROWDED if there was none."""

    async def write(self, writes: ConditionalWrites, touched: Sequence[str] = ()) -> Sequence[WriteOutcome | Problem]:
        """Writes sessions together, and refreshes the deadlines of the touched ones in the index.

        Returns:
            The outcome of each write: WRITTEN, CONFLICT or GONE, or the problem if the store refuses it.
        """

    async def end(self, key: str, reason: str, position: int | None = None) -> WriteOutcome:
        """Ends a session: WRITTEN, CONFLICT if it is not at the position, or GONE."""

    async def count(self) -> tuple[int, int]:
        """Returns the number of live sessions, and of those that have expired since the last call of any client."""

    async def longest_idle(self, client: str | None = None) -> str | None:
        """Returns the key of the session with the earliest deadline, of all or of those that a client has made."""

    async def page(self, owner: str, after: int, limit: int) -> tuple[list[SessionSummary | UnreadableRecord], int]:
        """Returns a page of an owner's sessions, without reading others', and where the next one starts; 0: nowhere.

        A session that lives throughout is on exactly one page. The first page starts at 0.
        """
