"""What stands before a session's states in its record, and the keys of sessions."""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Any, NamedTuple

from cellserve.service.sessions.stores.records import LATEST, POSITIONS, UnreadableRecord, VersionStamp

_HEADER = struct.Struct("<24sdIddIBB")
HEADER_BYTES = _HEADER.size
CHECKED = struct.Struct("<24sd24xBB")  # of a header: stamp, deadline, and the bytes of the creation digest and client
CHANGED = struct.Struct("<24sdI")  # its front, which each step writes: stamp, deadline, bytes of the states


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
        if len(record) >= HEADER_BYTES:
            header = cls._make(_HEADER.unpack_from(record))
            size = HEADER_BYTES + header.origin_bytes + header.client_bytes + header.state_bytes
            times = 0 <= header.created_at < LATEST and math.isfinite(header.deadline)
            if size <= len(record) and times and header.position < POSITIONS:
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
        return bytes(record[HEADER_BYTES : HEADER_BYTES + self.origin_bytes])

    def client(self, record: Any) -> bytes:
        """Returns the client's name in a record."""
        start = HEADER_BYTES + self.origin_bytes
        return bytes(record[start : start + self.client_bytes])

    def states(self, record: Any) -> bytes:
        """Returns the states in a record."""
        start = HEADER_BYTES + self.origin_bytes + self.client_bytes
        return bytes(record[start : start + self.state_bytes])

    def answer(self, record: Any) -> bytes:
        """Returns the stored answer in a record."""
        return bytes(record[HEADER_BYTES + self.origin_bytes + self.client_bytes + self.state_bytes :])

    def before_rest_of(self, record: Any) -> bytes:
        """Returns a record with this header instead of its own."""
        return self.pack() + bytes(record[HEADER_BYTES:])


# What each step needs of a record, without decoding the rest.


def stamp_and_deadline(record: Any) -> tuple[bytes, float]:
    """Returns the packed stamp and the deadline in a record; those of no session if it has no header."""
    return CHECKED.unpack_from(record)[:2] if len(record) >= HEADER_BYTES else (b"", math.inf)


@lru_cache(16384)  # one of a session in use is made once
def to_key(key: str) -> bytes:
    """Returns the key in the store of a session: its owner, which may be empty, a slash, and its id."""
    return (key if "/" in key else f"/{key}").encode(errors="surrogateescape")


def from_key(key: bytes) -> str:
    """Returns the key of which `to_key` makes this one, whatever bytes it has."""
    return key.decode(errors="surrogateescape").removeprefix("/")
