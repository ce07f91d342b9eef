"""Sleeping and locking among threads; `cellserve._async.concurrency` has the same for asyncio."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from time import sleep

from cellserve.protocol.session import SessionRecord

__all__ = ["Lock", "SessionLocks", "sleep"]


class SessionLocks:
    """Locks that give each session one request at a time: a position can only be sent once it is known.

    A group of sessions is locked all at once or not at all, so that two groups cannot block each other.
    """

    def __init__(self) -> None:
        self._released = threading.Condition()

    @contextmanager
    def hold(self, sessions: Sequence[SessionRecord]) -> Iterator[None]:
        """Waits until all of the sessions are free, and locks them."""
        with self._released:
            while any(session.locked for session in sessions):
                self._released.wait()
            for session in sessions:
                session.locked = True
        try:
            yield
        finally:
            with self._released:
                for session in sessions:
                    session.locked = False
                self._released.notify_all()
