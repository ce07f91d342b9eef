"""What can be wrong with a model repository."""

from __future__ import annotations


class BrokenModel(Exception):
    """A version cannot be served, or there is none; the message says why."""


class Stopping(Exception):
    """The server stops, and opens no version any more."""
