"""A running server as a place with sessions: those of one owner, through the API that all clients use."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TypeVar

import msgspec

from cellserve._sync.transport import Transport
from cellserve.errors import (
    CellserveError,
    NotFound,
    Problem,
    RetriesExhausted,
    SessionExists,
    SessionGone,
    Unauthorized,
)
from cellserve.protocol.http import SAFETENSORS, HttpRequest, HttpResponse, json_request, list_sessions, path_of
from cellserve.protocol.tensor_codec import read_safetensors, write_safetensors
from cellserve.retry import ONCE, Retry, Timeout
from cellserve.service.sessions.session import Durable
from cellserve.sessions.errors import NoSession, SessionFailed, SessionsError
from cellserve.sessions.place import Found, Listed
from cellserve.sessions.session_file import SavedSession

T = TypeVar("T")


class _Entry(msgspec.Struct):
    session: str
    model: str
    version: int
    position: int
    created_at: datetime


class _Page(msgspec.Struct):
    sessions: list[_Entry]
    next: str | None


class _About(msgspec.Struct):
    position: int
    created_at: datetime
    expires_in: float
    durable: Durable


class _State(msgspec.Struct):
    name: str


class _Signature(msgspec.Struct):
    states: list[_State]


class _Model(msgspec.Struct):
    digest: str
    signature: _Signature


class _StateMetadata(msgspec.Struct):
    model: str
    version: int
    digest: str
    position: int


class Server:
    """The sessions of a key's owner on a running server; a `Place`.

    What the API does not tell, an exported session does not have: its owner, if keys are used, and what answers a
    repetition of its last change. What the API cannot set, an imported one does not keep: its position.

    Args:
        url: URL of the server.
        key: The owner's key, if the server requires one.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.name, self._has_key = url, key is not None
        try:
            self._transport = Transport(url, key, Timeout(), Retry(seconds=30))
        except ValueError as error:
            raise SessionsError(f"--{error}") from None
        self._models: dict[str, _Model] = {}
        self._reached = False

    def sessions(self) -> Iterator[Listed]:
        """Iterates over the sessions, page by page."""
        after: str | None = None
        while True:
            page = self._read(list_sessions(after), _Page)
            for one in page.sessions:
                yield Listed(one.session, one.model, one.version, one.position, one.created_at.timestamp())
            after = page.next
            if after is None:
                return

    def read(self, name: str) -> Found:
        """Reads a session, which counts as a use of it."""
        about = self._read(HttpRequest("GET", _path(name)), _About, name)
        content = self._send(HttpRequest("GET", _path(name, "state")), name).content
        try:
            tensors, metadata = read_safetensors(content)
            told = msgspec.convert(metadata, _StateMetadata, strict=False)
            states = self._model(f"{told.model}:{told.version}", name).signature.states
            ordered = {state.name: tensors[state.name] for state in states}
        except (CellserveError, msgspec.ValidationError, KeyError) as error:
            raise self._strange(error) from None
        owner = None if self._has_key else ""
        session = SavedSession(
            name, owner, told.model, told.version, told.digest, told.position, ordered,
            created_at=about.created_at.timestamp(),
        )  # fmt: skip
        return Found(session, about.expires_in, about.durable)

    def write(self, session: SavedSession, replace: bool) -> bool:
        """Creates a session and uploads its state, so that it is at position 1; the owner is the key's."""
        model = f"{session.model}:{session.version}"
        if self._model(model, session.name).digest != session.digest:
            raise SessionFailed(f"{session.name}: the server's {model} is another model (its file's digest differs)")
        try:
            answer = self._send(json_request("PUT", _path(session.id), {"model": model}), session.name)
            created = answer.status == 201
        except _Exists:
            created = False
        if not created and not replace:
            found = self.read(session.id).session
            if found.digest == session.digest and _bits(found) == _bits(session):
                return False
            raise SessionFailed(f"{session.name} exists already, with another state: --replace sets that of the file")
        position = self._read(HttpRequest("GET", _path(session.id)), _About, session.name).position
        body = write_safetensors(session.states, {"model": session.model, "digest": session.digest})
        upload = HttpRequest("PUT", _path(session.id, "state"), body, SAFETENSORS, {"position": str(position)})
        self._send(upload, session.name)
        return True

    def close(self) -> None:
        """Closes the connection."""
        self._transport.close()

    def _model(self, model: str, name: str) -> _Model:
        if model not in self._models:
            self._models[model] = self._read(HttpRequest("GET", path_of("models", model)), _Model, name)
        return self._models[model]

    def _read(self, request: HttpRequest, kind: type[T], name: str = "") -> T:
        """Returns the answer to a request about a session; raises SessionsError."""
        try:
            return msgspec.json.decode(self._send(request, name).content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._strange(error) from None

    def _strange(self, error: Exception) -> SessionsError:
        return SessionsError(f"{self.name} does not answer as Cellserve does ({error}): is this its URL?")

    def _send(self, request: HttpRequest, name: str = "") -> HttpResponse:
        """Sends a request about a session; raises SessionsError."""
        about = f"{name}: " if name else ""
        try:
            # A server that does not answer the first request is not waited for.
            response = self._transport.send(request, None if self._reached else ONCE)
            self._reached = True
            return response
        except SessionExists:
            raise _Exists(f"{about}it exists already") from None
        except Unauthorized as error:
            hint = "" if self._has_key else ": give its owner's key with --key-file, or in CELLSERVE_API_KEY"
            raise SessionsError(f"{self.name}: {error.detail}{hint}") from None
        except (NotFound, SessionGone) as error:
            raise NoSession(f"{about}{error.detail}") from None
        except RetriesExhausted as error:
            raise SessionsError(f"no answer from {error.__cause__}") from None
        except Problem as problem:
            kind = SessionsError if problem.status >= 500 else SessionFailed
            raise kind(f"{about}{problem.detail}") from None
        except (CellserveError, ValueError) as error:
            raise SessionsError(f"{self.name}: {error}") from None


class _Exists(SessionFailed):
    """Another request has created a session of that id."""


def _path(*parts: str) -> str:
    return path_of("sessions", *parts)


def _bits(session: SavedSession) -> dict[str, bytes]:
    return {name: state.tobytes() for name, state in session.states.items()}
