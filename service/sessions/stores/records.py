"""What the shared store holds of a session, and how it is written there."""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass
from typing import ClassVar

_LAST = struct.Struct("<32sQQB")
_REVISION_BYTES = 16


@dataclass(frozen=True, slots=True)
class Mark:
    """Which state of a session it is: another history at the same position has another revision."""

    position: int
    revision: bytes  # 128 random bits, drawn anew by every write

    def __bytes__(self) -> bytes:
        return b"%d %b" % (self.position, self.revision)

    @classmethod
    def read(cls, content: bytes) -> Mark:
        """Reads what `bytes` gives."""
        position, _, revision = content.partition(b" ")
        return cls(int(position), revision)


@dataclass(frozen=True, slots=True)
class Last:
    """The last change with a position, and what its repetition is told."""

    NOTHING: ClassVar[int] = 0
    ANSWER: ClassVar[int] = 1
    BEFORE: ClassVar[int] = 2

    digest: bytes  # of the request
    position: int  # that it started from
    reached: int
    kind: int = NOTHING  # of the content: nothing, y, or the states before it
    content: bytes = b""

    def __bytes__(self) -> bytes:
        return _LAST.pack(self.digest, self.position, self.reached, self.kind) + self.content

    @classmethod
    def read(cls, content: bytes) -> Last | None:
        """Reads what `bytes` gives; None of nothing."""
        if not content:
            return None
        digest, position, reached, kind = _LAST.unpack_from(content)
        return cls(digest, position, reached, kind, content[_LAST.size :])


@dataclass(frozen=True, slots=True)
class Stored:
    """A session as it stands in the store."""

    FIELDS: ClassVar[tuple[str, ...]] = ("model", "version", "digest", "origin", "mark", "states", "last")

    model: str
    version: int
    digest: str  # of the model
    origin: bytes
    mark: Mark
    states: bytes
    last: Last | None = None

    def fields(self) -> list[bytes | str | int]:
        """Gives it as names and values."""
        values: list[bytes | str | int] = [self.model, self.version, self.digest, self.origin]
        values += [bytes(self.mark), self.states, b""]
        return [part for pair in zip(self.FIELDS, values, strict=True) for part in pair]

    @classmethod
    def read(cls, values: list[bytes]) -> Stored:
        """Reads the values of the fields."""
        model, version, digest, origin, mark, states, last = values
        return cls(model.decode(), int(version), digest.decode(), origin, Mark.read(mark), states, Last.read(last))


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a session that is not there any more."""

    reason: str
    position: int

    @classmethod
    def read(cls, content: bytes) -> Fate:
        """Reads what the scripts write: the reason and the position."""
        reason, _, position = content.partition(b" ")
        return cls(reason.decode(), int(position))


@dataclass(frozen=True, slots=True)
class Write:
    """A change of a session: what it is expected to be, and what of it is to be set."""

    key: str
    seen: Mark
    mark: Mark
    states: bytes
    last: Last | None  # stays as it was where the change has no position: nothing asks for it any more


def new_revisions(count: int) -> list[bytes]:
    """Draws so many revisions."""
    drawn = secrets.token_bytes(_REVISION_BYTES * count)
    return [drawn[start : start + _REVISION_BYTES] for start in range(0, len(drawn), _REVISION_BYTES)]
