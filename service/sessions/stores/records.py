"""Records of the shared store: what it keeps of a session, and how that is encoded.

What is read is input: others can write to the store too.
"""

from __future__ import annotations

import re
import secrets
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from cellserve.models.signature import NAME_PATTERN

_ANSWER = struct.Struct("<32sQQB")
_REVISION_BYTES = 16
_DIGITS = 18  # of a position, at most
_DIGEST = re.compile(r"[0-9a-f]{64}")
_STAMP = re.compile(rb"([0-9]{1,%d}) (.{%d})" % (_DIGITS, _REVISION_BYTES), re.DOTALL)
_TOMBSTONE = re.compile(rb"(deleted|expired|evicted) ([0-9]{1,%d})" % _DIGITS)


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
    revision: bytes  # 128 random bits, new for each write

    def __bytes__(self) -> bytes:
        return b"%d %b" % (self.position, self.revision)

    @classmethod
    def read(cls, content: bytes) -> VersionStamp:
        """Decodes what `bytes` encodes; raises UnreadableRecord."""
        parts = _STAMP.fullmatch(content)
        if parts is None:
            raise UnreadableRecord("its position is invalid")
        return cls(int(parts[1]), parts[2])


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
        return _ANSWER.pack(self.digest, self.position, self.position_after, self.kind) + self.content

    @classmethod
    def read(cls, content: bytes) -> StoredAnswer | None:
        """Decodes what `bytes` encodes; returns None for empty content; raises UnreadableRecord."""
        if not content:
            return None
        if len(content) < _ANSWER.size:
            raise UnreadableRecord("its last answer is cut off")
        digest, position, position_after, kind = _ANSWER.unpack_from(content)
        if kind not in (cls.NOTHING, cls.ANSWER, cls.BEFORE) or max(position, position_after) >= 10**_DIGITS:
            raise UnreadableRecord("its last answer is damaged")
        return cls(digest, position, position_after, kind, content[_ANSWER.size :])


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session in the store."""

    FIELDS: ClassVar[tuple[str, ...]] = ("model", "version", "digest", "origin", "mark", "states", "last")
    SUMMARY: ClassVar[tuple[str, ...]] = ("model", "version", "mark")

    model: str
    version: int
    digest: str  # SHA-256 of the model file
    creation_digest: bytes
    stamp: VersionStamp
    states: bytes
    last: StoredAnswer | None = None

    def fields(self) -> list[bytes | str | int]:
        """Encodes a new session as alternating field names and values."""
        values: list[bytes | str | int] = [self.model, self.version, self.digest, self.creation_digest]
        values += [bytes(self.stamp), self.states, b"" if self.last is None else bytes(self.last)]
        return [part for pair in zip(self.FIELDS, values, strict=True) for part in pair]

    @classmethod
    def read(cls, values: list[bytes | None]) -> SessionRecord:
        """Decodes the values of the fields; raises UnreadableRecord. States are not looked into."""
        if None in values:
            raise UnreadableRecord("a field is missing")
        model, version, digest, creation_digest, stamp, states, last = (value or b"" for value in values)
        name, number, _ = cls.read_summary([model, version, stamp])
        digest_read = digest.decode("latin-1")
        if not _DIGEST.fullmatch(digest_read):
            raise UnreadableRecord("its model's digest is damaged")
        stamp_read, last_read = VersionStamp.read(stamp), StoredAnswer.read(last)
        return cls(name, number, digest_read, creation_digest, stamp_read, states, last_read)

    @classmethod
    def read_summary(cls, values: list[bytes | None]) -> tuple[str, int, int]:
        """Decodes the fields that SUMMARY names: model, version and position; raises UnreadableRecord."""
        model, version, stamp = (b"" if value is None else value for value in values)
        name = model.decode("latin-1")
        if not re.fullmatch(NAME_PATTERN, name) or not re.fullmatch(rb"[1-9][0-9]{0,8}", version):
            raise UnreadableRecord("its model or version is invalid")
        return name, int(version), VersionStamp.read(stamp).position


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
class ConditionalWrite:
    """A change of a session, applied only if the session still has the expected stamp."""

    key: str
    expected: VersionStamp
    stamp: VersionStamp
    states: bytes
    last: StoredAnswer | None  # None leaves the stored answer: a change without a position cannot be replayed


def new_revisions(count: int) -> list[bytes]:
    """Returns new random revisions."""
    drawn = secrets.token_bytes(_REVISION_BYTES * count)
    return [drawn[start : start + _REVISION_BYTES] for start in range(0, len(drawn), _REVISION_BYTES)]
