"""Records of the shared store: what it keeps of a session, and how that is encoded."""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

_ANSWER = struct.Struct("<32sQQB")
_REVISION_BYTES = 16


class WriteOutcome(StrEnum):
    """The outcome of a conditional write; the scripts in the store return these words."""

    WRITTEN = "written"
    CONFLICT = "other"  # the session is not in the expected state
    GONE = "gone"  # the session has ended
    EXISTS = "there"  # there is a session of that id already


@dataclass(frozen=True, slots=True)
class VersionStamp:
    """Identifies one state of a session: different histories at the same position have different revisions."""

    position: int
    revision: bytes  # 128 random bits, new for each write

    def __bytes__(self) -> bytes:
        return b"%d %b" % (self.position, self.revision)

    @classmethod
    def read(cls, content: bytes) -> VersionStamp:
        """Decodes what `bytes` encodes."""
        position, _, revision = content.partition(b" ")
        return cls(int(position), revision)


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
        """Decodes what `bytes` encodes; returns None for empty content."""
        if not content:
            return None
        digest, position, position_after, kind = _ANSWER.unpack_from(content)
        return cls(digest, position, position_after, kind, content[_ANSWER.size :])


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session in the store."""

    FIELDS: ClassVar[tuple[str, ...]] = ("model", "version", "digest", "origin", "mark", "states", "last")

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
        values += [bytes(self.stamp), self.states, b""]
        return [part for pair in zip(self.FIELDS, values, strict=True) for part in pair]

    @classmethod
    def read(cls, values: list[bytes]) -> SessionRecord:
        """Decodes the values of the fields."""
        model, version, digest, creation_digest, stamp, states, last = values
        return cls(
            model.decode(),
            int(version),
            digest.decode(),
            creation_digest,
            VersionStamp.read(stamp),
            states,
            StoredAnswer.read(last),
        )


@dataclass(frozen=True, slots=True)
class TombstoneRecord:
    """What the store remembers of a session that has ended."""

    reason: str
    position: int

    @classmethod
    def read(cls, content: bytes) -> TombstoneRecord:
        """Decodes what the scripts write: the reason and the position."""
        reason, _, position = content.partition(b" ")
        return cls(reason.decode(), int(position))


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
