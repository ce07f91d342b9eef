"""What `cellserve sessions` cannot do: one line for the person who called it."""

from __future__ import annotations


class SessionsError(Exception):
    """It cannot be done; the message says why, and what to do instead."""


class SessionFailed(SessionsError):
    """It cannot be done with one session or its file; others are not concerned."""


class NoSession(SessionFailed):
    """There is no session of that name, or not any more."""
