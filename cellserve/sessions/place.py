"""A place with sessions: a running server, or a store that is read directly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from cellserve.service.sessions.session import Durable
from cellserve.sessions.session_file import SavedSession


@dataclass(frozen=True, slots=True)
class Listed:
    """A session in a list."""

    name: str  # its id, behind its owner and a slash if it has one
    model: str = ""
    version: int = 0
    position: int = 0
    created_at: float | None = None  # seconds since the epoch; None if the place does not tell
    expires_in: float | None = None  # seconds; None if the place does not tell
    unreadable: str = ""  # why what is there is not a session


@dataclass(frozen=True, slots=True)
class Found:
    """A session that was looked up."""

    session: SavedSession
    expires_in: float  # seconds
    durable: Durable


class Place(Protocol):
    """A place with sessions. Every method raises SessionsError."""

    name: str  # what messages call it: without a password

    def sessions(self) -> Iterator[Listed]:
        """Iterates over its sessions; those that live throughout come once."""

    def read(self, name: str) -> Found:
        """Reads a session as it is, without extending its life if the place is a store."""

    def write(self, session: SavedSession, replace: bool) -> bool:
        """Creates a session.

        Args:
            session: The session.
            replace: Replace another session of that name.

        Returns:
            Whether it was created; it may have been there already, the same in every bit.
        """

    def close(self) -> None:
        """Closes what is open."""
