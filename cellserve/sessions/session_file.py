"""The file of an exported session: its states in safetensors, everything else about it in the metadata.

The tensors are those of `GET /sessions/{id}/state`, so that the file can be uploaded to a session of the same model, or
read by anything that reads safetensors.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
import numpy as np
import orjson
from msgspec import Meta
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cellserve.models.signature import NAME_PATTERN
from cellserve.service.access.private_files import create_private
from cellserve.service.sessions.session import LONGEST_ID, time_text
from cellserve.service.sessions.stores.records import LATEST, StoredAnswer, UnreadableRecord
from cellserve.service.validation.safetensors_header import BadHeader, read_header
from cellserve.sessions.errors import SessionFailed, SessionsError

Array = NDArray[Any]

SUFFIX = ".safetensors"
_FORMAT = 1
_DTYPES = ("float32", "int32", "int64")
_LONGEST_NAME = 200  # of a file, in bytes, without what makes it unique


@dataclass(frozen=True, slots=True)
class SavedSession:
    """A session outside of a store."""

    id: str
    owner: str | None  # empty where no keys are used; None if it is not known
    model: str
    version: int
    digest: str  # SHA-256 of the model file
    position: int
    states: dict[str, Array]  # in the model's order
    creation_digest: bytes = b""
    last: StoredAnswer | None = None  # what answers the repetition of its last change
    created_at: float | None = None  # seconds since the epoch; None if it is not known

    @property
    def name(self) -> str:
        """The id, behind its owner and a slash if it has one."""
        return f"{self.owner}/{self.id}" if self.owner else self.id

    def write(self, file: Path) -> None:
        """Writes a file that only its owner can read; raises SessionFailed if there is one, or if it cannot."""
        metadata = {
            "cellserve_session": str(_FORMAT),
            "session": self.id,
            "model": self.model,
            "version": str(self.version),
            "digest": self.digest,
            "position": str(self.position),
            "states": orjson.dumps(list(self.states)).decode(),
        }
        if self.owner is not None:
            metadata["owner"] = self.owner
        if self.created_at is not None:
            metadata["created_at"] = time_text(self.created_at)
        if self.creation_digest:
            metadata["creation_digest"] = self.creation_digest.hex()
        if self.last is not None:
            metadata["last_change"] = base64.b64encode(bytes(self.last)).decode()
        new = file.with_name(f".{hashlib.sha256(file.name.encode()).hexdigest()[:16]}.new")
        try:
            if file.exists():
                raise SessionFailed(f"{file} exists already: move it away, or give another --to")
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with create_private(new) as opened:
                opened.write(save(self.states, metadata))
            new.replace(file)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise SessionFailed(f"{file}: {error.strerror}") from None


class _Metadata(msgspec.Struct):
    """The metadata of a file, as input."""

    session: Annotated[str, Meta(pattern=rf"^[A-Za-z0-9._~-]{{1,{LONGEST_ID}}}\Z")]
    model: Annotated[str, Meta(pattern=NAME_PATTERN)]
    version: Annotated[int, Meta(ge=1, lt=10**9)]
    digest: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    position: Annotated[int, Meta(ge=0, lt=10**17)]  # a store has ten times as many: the session steps on
    states: str
    owner: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,64}\Z")] | None = None
    creation_digest: Annotated[str, Meta(pattern=r"^([0-9a-f]{2}){0,64}\Z")] = ""
    last_change: str = ""
    created_at: Annotated[datetime, Meta(tz=True)] | None = None


def read(file: Path) -> SavedSession:
    """Reads the file of an exported session; raises SessionFailed if it is none."""
    try:
        content = file.read_bytes()
        tensors = dict(load(content))
        metadata = read_header(content).get("__metadata__") or {}
        if "cellserve_session" not in metadata:
            raise SessionFailed(f"{file} is not an exported session: give files that `cellserve sessions export` wrote")
        if metadata["cellserve_session"] != str(_FORMAT):
            raise SessionFailed(
                f"{file} has format {metadata['cellserve_session'][:20]!r}, of a newer Cellserve; this one reads "
                f"{_FORMAT}: use the newer one"
            )
        told = msgspec.convert(metadata, _Metadata, strict=False)
        names = msgspec.json.decode(told.states, type=list[str])
        if sorted(names) != sorted(tensors):
            raise ValueError("its tensors are not the states that it names")
        if any(str(one.dtype) not in _DTYPES for one in tensors.values()):
            raise ValueError(f"a state has another type than {', '.join(_DTYPES)}")
        if any(one.dtype.kind == "f" and not np.isfinite(one).all() for one in tensors.values()):
            raise ValueError("a state has a number that is not finite")
        created_at = None if told.created_at is None else told.created_at.timestamp()
        if created_at is not None and not 0 <= created_at < LATEST:
            raise ValueError("it was created at no time that there is")
        last = StoredAnswer.read(base64.b64decode(told.last_change, validate=True))
    except OSError as error:
        raise SessionFailed(f"{file}: {error.strerror}") from None
    except (SafetensorError, BadHeader, msgspec.ValidationError, ValueError, binascii.Error, UnreadableRecord) as error:
        raise SessionFailed(f"{file} is not an exported session, or is damaged: {error}") from None
    return SavedSession(
        told.session, told.owner, told.model, told.version, told.digest, told.position,
        {name: tensors[name] for name in names}, bytes.fromhex(told.creation_digest), last,
        created_at,
    )  # fmt: skip


def name_of(session_name: str) -> str:
    """Returns the name of a session's file in a folder, below one of its owner's if it has one."""
    owner, _, session_id = session_name.rpartition("/")
    file = f"{_quoted(session_id)}{SUFFIX}"
    return f"{_quoted(owner)}/{file}" if owner else file


def _quoted(name: str) -> str:
    """Returns the name of a file or a folder, whatever the name is: neither a path, nor hidden, nor too long."""
    quoted = quote(name, safe="~", errors="backslashreplace")
    if len(quoted) > _LONGEST_NAME or quoted.startswith("."):
        digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:16]
        quoted = f"{quoted[:_LONGEST_NAME].lstrip('.')}-{digest}"
    return quoted


def files_in(given: Path) -> list[Path]:
    """Returns a file, or all files of sessions in a folder; raises SessionsError if there are none."""
    if not given.is_dir():
        return [given]
    found = sorted(given.rglob(f"*{SUFFIX}"))
    if not found:
        raise SessionsError(f"there are no exported sessions in {given} (*{SUFFIX})")
    return found
