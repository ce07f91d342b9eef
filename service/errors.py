"""All that can be answered instead of a result: typed where it arises, RFC 9457 problem documents on the wire."""

from __future__ import annotations

from typing import Any, ClassVar

import orjson

MEDIA_TYPE = b"application/problem+json"


class Problem(Exception):
    """An answer that is not a result.

    Args:
        detail: What was wrong, where, and what to send instead.
        extensions: Members of the document that a program can act on.
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "The server made a mistake"
    retry_after: ClassVar[int | None] = None  # seconds

    def __init__(self, detail: str, **extensions: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extensions = extensions

    @classmethod
    def kind(cls) -> str:
        """Gives the name of the kind of problem: `position-conflict`."""
        name = "".join("-" + letter.lower() if letter.isupper() else letter for letter in cls.__name__)
        return name.removeprefix("-")

    def document(self, request_id: str | None = None) -> bytes:
        """Gives the problem document (RFC 9457, section 3), with the request's id where there is one."""
        document = {
            "type": f"urn:cellserve:problem:{self.kind()}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **self.extensions,
        }
        if request_id is not None:
            document["request_id"] = request_id
        return orjson.dumps(document)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Gives the headers of the answer."""
        headers = [(b"content-type", MEDIA_TYPE)]
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        return headers


class NotJson(Problem):
    """The body cannot be parsed at all."""

    status = 400
    title = "The body is not JSON"


class NotSafetensors(Problem):
    """The body cannot be parsed at all."""

    status = 400
    title = "The body is not in safetensors"


class InvalidInput(Problem):
    """The body parses but something in it does not fit; `place` says where."""

    status = 422
    title = "The input does not fit"


class CannotBeStepped(Problem):
    """The model takes whole sequences only, it says why; no session can be had of it."""

    status = 422
    title = "The model cannot be stepped"


class CannotRollOut(Problem):
    """The model's outputs are not said to be its next inputs."""

    status = 422
    title = "The model cannot go on by itself"


class NotFinite(InvalidInput):
    """The model's output or next state would not be finite; nothing was applied."""

    title = "The model's numbers stop being finite"


class Unauthorized(Problem):
    """No key came with the request, or one that is not known."""

    status = 401
    title = "A key is needed"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Gives the headers of the answer (RFC 6750, section 3)."""
        return [*super().headers(), (b"www-authenticate", b"Bearer")]


class Forbidden(Problem):
    """The page that the browser shows may not open sockets here."""

    status = 403
    title = "The origin is not allowed"


class NotAnOperator(Problem):
    """The key is known, but is not of one who runs the server."""

    status = 403
    title = "The key is not an operator's"


class NotFound(Problem):
    """No such path."""

    status = 404
    title = "There is nothing here"


class UnknownModel(NotFound):
    """No model of that name is served."""

    title = "No such model"


class UnknownSession(NotFound):
    """No session of that id, as far as is known."""

    title = "No such session"


class SessionGone(Problem):
    """The session was here: it was deleted or has expired."""

    status = 410
    title = "The session is gone"


class Conflict(Problem):
    """The session is not as the request takes it to be; nothing was applied."""

    status = 409


class PositionConflict(Conflict):
    """The session has gone on from the position that the request starts from."""

    title = "The session is at another position"


class SessionWentBack(Conflict):
    """The client has seen the session further on than it is now."""

    title = "The session is behind the client"


class StepInFlight(Conflict):
    """A change with a position is under way in the session."""

    title = "A change of the session is under way"
    retry_after = 1


class SessionExists(Conflict):
    """There is a session of that id, made by another request."""

    title = "There is such a session already"


class StateOfAnotherModel(Conflict):
    """The state that was sent was taken from another model."""

    title = "The state is another model's"


class MethodNotAllowed(Problem):
    """The path takes other methods."""

    status = 405
    title = "The path does not take this method"


class UpgradeRequired(Problem):
    """The path is a WebSocket and was asked for over plain HTTP."""

    status = 426
    title = "The path is a WebSocket"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Gives the headers of the answer (RFC 9110, sections 7.8 and 15.5.22)."""
        return [*super().headers(), (b"upgrade", b"websocket"), (b"connection", b"upgrade")]


class BodyTooLarge(Problem):
    """The body, or what it holds, is over a limit that is a setting."""

    status = 413
    title = "The request is too large"


class UnsupportedMediaType(Problem):
    """The body's content type is not one that the path takes."""

    status = 415
    title = "The content type is not supported"


class ServerFull(Problem):
    """There are as many sessions as may be."""

    status = 503
    title = "The server is full"
    retry_after = 10


class ModelVersionNotHere(Problem):
    """The session is bound to a version of a model that this server has not."""

    status = 503
    title = "The session's model is not served here"
    retry_after = 5


class VersionLoading(Problem):
    """The version is in the repository and is being loaded, since this request asked for it."""

    status = 503
    title = "The version is being loaded"
    retry_after = 1

    def __init__(self, key: tuple[str, int]) -> None:
        super().__init__(f"model: version {key[1]} of {key[0]!r} is being loaded: try again in a second")
        self.key = key


class RepositoryUnusable(Problem):
    """The model repository cannot be read, or is empty; what was served still is."""

    status = 503
    title = "The models cannot be read"
    retry_after = 5


class Stale(Problem):
    """Another server has changed the session since this one read it: it is read again before anything else is done."""

    status = 503
    title = "The session was changed elsewhere"
    retry_after = 1

    def __init__(self, detail: str = "another server changes the session all the time: try again in a second") -> None:
        super().__init__(detail)


class StoreAway(Problem):
    """The store of sessions does not answer; what was under way is looked up before anything else is done."""

    status = 503
    title = "The store is away"
    retry_after = 1


class Stopping(Problem):
    """The server stops; what has been applied stays so, and the rest can be had of whoever comes after it."""

    status = 503
    title = "The server is stopping"
    retry_after = 1


class QueueFull(Problem):
    """More work is waiting than may wait."""

    status = 503
    title = "The server has too much to do"
    retry_after = 1


class ModelFailed(Problem):
    """ONNX Runtime could not run the model on this request; nothing was applied."""

    status = 500
    title = "The model could not be run"
