"""Records of the shared store: what it keeps of a session, and how that is encoded.

What is read is input: others can write to the store too.
"""

from __future__ import annotations

import re
import secrets
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import repeat
from typing import ClassVar

from cellserve.models.signature import NAME_PATTERN

_ANSWER = struct.Struct("<32sQQB")
_PACKED_STAMP = struct.Struct("<Q16s")
_REVISION_BYTES = 16
_DIGITS = 18  # of a position, at most
POSITIONS = 10**_DIGITS
_DIGEST = re.compile(r"[0-9a-f]{64}")
_STAMP = re.compile(rb"([0-9]{1,%d}) (.{%d})" % (_DIGITS, _REVISION_BYTES), re.DOTALL)
LATEST = 1e11  # seconds since the epoch, for the times of creation that are read: in the year 5138
_TIME = re.compile(rb"[0-9]{1,11}\.[0-9]{3}")  # before LATEST
_TOMBSTONE = re.compile(rb"(deleted|expired|evicted) ([0-9]{1,%d})" % _DIGITS)


NO_STAMP = bytes(_PACKED_STAMP.size)  # a packed stamp that no session has: revisions are random


class UnreadableRecord(Exception):
    """What the store has under a session's name is not a session; the message is one of few, and names no session."""


class WriteOutcome(StrEnum):
    """The outcome of a conditional write; the scripts in the store return these words."""

    WRITTEN = "written"
    CONFLICT = "other"  # the session is not in the expected state
    GONE = "gone"  # the session has ended
    EXISTS = "there"  # there is a session of that id already
    FULL = "full"  # there are as many sessions as there may be
    CROWDED = "crowded"  # the client has too many


@dataclass(frozen=True, slots=True)
class VersionStamp:
    """Identifies one state of a session: different histories at the same position have different revisions."""

    position: int
    revision: bytes  # 128 random bits, new for each write of one or several sessions

    def __bytes__(self) -> bytes:
        return b"%d %b" % (self.position, self.revision)

    @classmethod
    def read(cls, content: bytes) -> VersionStamp:
        """Decodes what `bytes` encodes; raises UnreadableRecord."""
        parts = _STAMP.fullmatch(content)
        if parts is None:
            raise UnreadableRecord("its position is invalid")
        return cls(int(parts[1]), parts[2])

    @property
    def packed(self) -> bytes:
        """The stamp in 24 bytes: what is compared on every step."""
        return _PACKED_STAMP.pack(self.position, self.revision)

    @staticmethod
    def text_of(packed: bytes) -> bytes:
        """Returns `bytes` of a packed stamp."""
        return b"%d %b" % _PACKED_STAMP.unpack(packed)

    @classmethod
    def unpack(cls, packed: bytes) -> VersionStamp:
        """Returns the stamp of which `packed` makes these bytes."""
        return cls(*_PACKED_STAMP.unpack(packed))


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """The last change with a position, and what is needed to answer its repetition."""

    NOTHING: ClassVar[int] = 0
    ANSWER: ClassVar[int] = 1
    BEFORE: ClassVar[int] = 2

    digest: bytes  # digest of the change's idempotency key
    position: int  # before the change
    position_after: int
    kind: int = NOTHING  # what `content` is: nothing, y, or the states before the change
    content: bytes = b""

    def __bytes__(self) -> bytes:
        return encoded_answer(self.digest, self.position, self.position_after, self.kind, self.content)

    @classmethod
    def read(cls, content: bytes) -> StoredAnswer | None:
        """Decodes what `bytes` encodes; returns None for empty content; raises UnreadableRecord."""
        if not content:
            return None
        if len(content) < _ANSWER.size:
            raise UnreadableRecord("its last answer is cut off")
        digest, position, position_after, kind = _ANSWER.unpack_from(content)
        if kind not in (cls.NOTHING, cls.ANSWER, cls.BEFORE) or max(position, position_after) >= POSITIONS:
            raise UnreadableRecord("its last answer is damaged")
        return cls(digest, position, position_after, kind, content[_ANSWER.size :])


def encoded_answer(digest: bytes, position: int, position_after: int, kind: int, content: bytes) -> bytes:
    """Returns the bytes of a `StoredAnswer` of these."""
    return _ANSWER.pack(digest, position, position_after, kind) + content


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session in the store."""

    FIELDS: ClassVar[tuple[str, ...]] = ("model", "version", "digest", "origin", "created", "mark", "states", "last")
    SUMMARY: ClassVar[tuple[str, ...]] = ("model", "version", "mark", "created")

    model: str
    version: int
    digest: str  # SHA-256 of the model file
    creation_digest: bytes
    stamp: VersionStamp
    states: bytes
    last: StoredAnswer | None = None
    created_at: float = field(default_factory=time.time)  # seconds since the epoch

    def fields(self) -> list[bytes | str | int]:
        """Encodes a new session as alternating field names and values."""
        values: list[bytes | str | int] = [self.model, self.version, self.digest, self.creation_digest]
        values += [b"%.3f" % self.created_at]
        values += [bytes(self.stamp), self.states, b"" if self.last is None else bytes(self.last)]
        return [part for pair in zip(self.FIELDS, values, strict=True) for part in pair]

    @classmethod
    def read(cls, values: list[bytes | None]) -> SessionRecord:
        """Decodes the values of the fields; raises UnreadableRecord. States are not looked into."""
        if None in values:
            raise UnreadableRecord("a field is missing")
        model, version, digest, creation_digest, created, stamp, states, last = (value or b"" for value in values)
        name, number, _, created_at = cls.read_summary([model, version, stamp, created])
        digest_read = digest.decode("latin-1")
        if not _DIGEST.fullmatch(digest_read):
            raise UnreadableRecord("its model's digest is damaged")
        stamp_read, last_read = VersionStamp.read(stamp), StoredAnswer.read(last)
        return cls(name, number, digest_read, creation_digest, stamp_read, states, last_read, created_at)

    @classmethod
    def read_summary(cls, values: list[bytes | None]) -> tuple[str, int, int, float]:
        """Decodes the fields that SUMMARY names: model, version, position, creation; raises UnreadableRecord."""
        model, version, stamp, created = (b"" if value is None else value for value in values)
        name = model.decode("latin-1")
        if not re.fullmatch(NAME_PATTERN, name) or not re.fullmatch(rb"[1-9][0-9]{0,8}", version):
            raise UnreadableRecord("its model or version is invalid")
        if not _TIME.fullmatch(created):
            raise UnreadableRecord("the time of its creation is invalid")
        return name, int(version), VersionStamp.read(stamp).position, float(created)


@dataclass(frozen=True, slots=True)
class TombstoneRecord:
    """What the store remembers of a session that has ended."""

    reason: str
    position: int

    @classmethod
    def read(cls, content: bytes) -> TombstoneRecord:
        """Decodes what the scripts write: the reason and the position; raises UnreadableRecord."""
        parts = _TOMBSTONE.fullmatch(content)
        if parts is None:
            raise UnreadableRecord("it has neither a session nor how one ended")
        return cls(parts[1].decode(), int(parts[2]))


@dataclass(frozen=True, slots=True)
class ConditionalWrites:
    """Changes of sessions, by row: each is applied only if its session still has the expected stamp.

    A tick writes hundreds of sessions: columns of bytes cost it a fraction of what an object for each row does.
    """

    keys: Sequence[str]
    expected: Sequence[bytes]  # packed stamps
    stamps: Sequence[bytes]  # packed
    states: Sequence[bytes]
    answers: Sequence[bytes]  # encoded `StoredAnswer`s; empty for a change without a position, which is not replayed

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Sequence[int]) -> ConditionalWrites:
        """Returns some of the changes."""
        columns = self.keys, self.expected, self.stamps, self.states, self.answers
        return ConditionalWrites(*([column[row] for row in rows] for column in columns))  # type: ignore[arg-type]


def new_revision() -> bytes:
    """Returns a new random revision."""
    return secrets.token_bytes(_REVISION_BYTES)


def new_stamps(positions: Sequence[int]) -> list[bytes]:
    """Returns new packed stamps of different sessions at these positions; they share one revision."""
    return list(map(_PACKED_STAMP.pack, positions, repeat(new_revision())))
