"""What stands before a session's states in its record, and the keys of sessions."""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Any, NamedTuple

from cellserve.service.sessions.stores.records import LATEST, UnreadableRecord, VersionStamp

_HEADER = struct.Struct("<24sdIddIBB")
_CHECKED = struct.Struct("<24sd")
_CHANGED = struct.Struct("<dI")
_KEPT_FROM = struct.calcsize("<24sdI")
_LENGTHS_FROM = _HEADER.size - 2


class Header(NamedTuple):
    """The header of a session's record. Behind it: the creation digest, client, states, and the stored answer."""

    stamp: bytes  # packed
    deadline: float  # as all times, in seconds since the epoch
    state_bytes: int
    indexed: float  # the time of its entry in the index of deadlines
    created_at: float
    model: int  # its number
    origin_bytes: int  # of the creation digest
    client_bytes: int  # of the client's name

    @classmethod
    def read(cls, record: Any) -> Header:
        """Decodes the header of a record; raises UnreadableRecord."""
        if len(record) >= _HEADER.size:
            header = cls._make(_HEADER.unpack_from(record))
            size = _HEADER.size + header.origin_bytes + header.client_bytes + header.state_bytes
            if size <= len(record) and 0 <= header.created_at < LATEST and math.isfinite(header.deadline):
                return header
        raise UnreadableRecord("its header is damaged")

    def pack(self) -> bytes:
        """Encodes it."""
        return _HEADER.pack(*self)

    @property
    def position(self) -> int:
        """The session's position."""
        return VersionStamp.unpack(self.stamp).position

    def origin(self, record: Any) -> bytes:
        """Returns the creation digest in a record."""
        return bytes(record[_HEADER.size : _HEADER.size + self.origin_bytes])

    def client(self, record: Any) -> bytes:
        """Returns the client's name in a record."""
        start = _HEADER.size + self.origin_bytes
        return bytes(record[start : start + self.client_bytes])

    def states(self, record: Any) -> bytes:
        """Returns the states in a record."""
        start = _HEADER.size + self.origin_bytes + self.client_bytes
        return bytes(record[start : start + self.state_bytes])

    def answer(self, record: Any) -> bytes:
        """Returns the stored answer in a record."""
        return bytes(record[_HEADER.size + self.origin_bytes + self.client_bytes + self.state_bytes :])

    def before_rest_of(self, record: Any) -> bytes:
        """Returns a record with this header instead of its own."""
        return self.pack() + bytes(record[_HEADER.size :])


# What each step needs of a record, without decoding the rest.


def stamp_and_deadline(record: Any) -> tuple[bytes, float]:
    """Returns the packed stamp and the deadline in a record; those of no session if it has no header."""
    return _CHECKED.unpack_from(record) if len(record) >= _HEADER.size else (b"", math.inf)


def changed(record: Any, stamp: bytes, until: float, states: bytes, answer: bytes) -> bytes:
    """Returns a session's record after a change.

    Args:
        record: Its record before.
        stamp: The packed stamp after it.
        until: The deadline.
        states: The states.
        answer: The stored answer, if there is one. That of an earlier change is of no use any more.
    """
    kept = record[_KEPT_FROM : _HEADER.size + record[_LENGTHS_FROM] + record[_LENGTHS_FROM + 1]]
    return b"".join((stamp, _CHANGED.pack(until, len(states)), kept, states, answer))


@lru_cache(16384)  # one of a session in use is made once
def to_key(key: str) -> bytes:
    """Returns the key in the store of a session: its owner, which may be empty, a slash, and its id."""
    return (key if "/" in key else f"/{key}").encode()


def from_key(key: bytes) -> str:
    """Returns the key of which `to_key` makes this one."""
    return key.decode().removeprefix("/")
