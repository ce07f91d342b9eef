"""Everything that can be answered instead of a result: typed exceptions, RFC 9457 problem documents on the wire.

Here stand the statuses, titles and headers. The detail of each is written where it is raised: that of a step with the
wrong position in `idempotency.py`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any, ClassVar

import orjson

MEDIA_TYPE = b"application/problem+json"
_LONGEST_EXCERPT = 80  # characters of a request in a message
_LONGEST_DETAIL = 2000
_LONGEST_MEMBER = 200
_MOST_NAMES, _LONGEST_NAME = 4, 40


def excerpt(text: str, most: int = _LONGEST_EXCERPT) -> str:
    """Returns what a message repeats of a request: cut, and without lone surrogates, which UTF-8 cannot carry."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return cut if cut.isascii() else cut.encode(errors="replace").decode()


def printable(text: str) -> str:
    """Returns text from elsewhere for a terminal or a log: what would steer it, or end the line, is escaped."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def listed(names: Iterable[str]) -> str:
    """Returns names of a request for a message, as a Python list of the first few: `['a', 'b', ...]`."""
    given = list(names)
    first = given if len(given) <= _MOST_NAMES else heapq.nsmallest(_MOST_NAMES, given)
    more = ", ..." if len(given) > _MOST_NAMES else ""
    return f"[{', '.join(repr(excerpt(name, _LONGEST_NAME)) for name in sorted(first))}{more}]"


class Problem(Exception):
    """An answer that is not a result.

    Args:
        detail: What was wrong, where, and what to send instead.
        extensions: Further members of the document, for programs to act on.
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "The server made a mistake"
    retry_after: ClassVar[int | None] = None  # seconds
    wire_kind: ClassVar[str | None] = None  # overrides the kind that is derived from the class name

    def __init__(self, detail: str, **extensions: Any) -> None:
        detail = excerpt(detail, _LONGEST_DETAIL)
        super().__init__(detail)
        self.detail = detail
        self.extensions = {
            name: excerpt(value, _LONGEST_MEMBER) if isinstance(value, str) else value
            for name, value in extensions.items()
        }

    @classmethod
    def kind(cls) -> str:
        """Returns the kind of problem, for example `position-conflict`."""
        if cls.wire_kind is not None:
            return cls.wire_kind
        name = "".join("-" + letter.lower() if letter.isupper() else letter for letter in cls.__name__)
        return name.removeprefix("-")

    def document(self, request_id: str | None = None) -> bytes:
        """Returns the problem document (RFC 9457, section 3), with the request's id if there is one."""
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
        """Returns the headers of the answer."""
        headers = [(b"content-type", MEDIA_TYPE)]
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        return headers


class NotJson(Problem):
    """The body is not valid JSON."""

    status = 400
    title = "The body is not JSON"


class NotSafetensors(Problem):
    """The body is not a valid safetensors document."""

    status = 400
    title = "The body is not in safetensors"


class InvalidInput(Problem):
    """The body parses, but something in it does not fit; `place` says where."""

    status = 422
    title = "The input does not fit"


class CannotBeStepped(Problem):
    """The model takes whole sequences only, so it has no sessions."""

    status = 422
    title = "The model cannot be stepped"


class CannotRollOut(Problem):
    """The model does not declare that its outputs are its next inputs."""

    status = 422
    title = "The model cannot be rolled out"


class NotFinite(InvalidInput):
    """The model's output or next state would not be finite; nothing was applied."""

    title = "The model's output or state is not finite"


class Unauthorized(Problem):
    """The request has no key, or an unknown one."""

    status = 401
    title = "A key is needed"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Returns the headers of the answer (RFC 6750, section 3)."""
        return [*super().headers(), (b"www-authenticate", b"Bearer")]


class TooManyWrongKeys(Problem):
    """The address has sent many wrong keys; for now only keys are taken that it has used before."""

    status = 429
    title = "Too many wrong keys"

    def __init__(self, wait_seconds: int) -> None:
        super().__init__(f"too many wrong keys from this address: send the right one in {wait_seconds} seconds")
        self.wait_seconds = wait_seconds

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Returns the headers of the answer."""
        return [*super().headers(), (b"retry-after", b"%d" % self.wait_seconds)]


class Forbidden(Problem):
    """A browser's page of that origin may not open sockets or change anything here."""

    status = 403
    title = "The origin is not allowed"


class NotAnOperator(Problem):
    """The key is known, but its owner is not an operator."""

    status = 403
    title = "The key is not an operator's"


class NotFound(Problem):
    """The path does not exist."""

    status = 404
    title = "There is nothing here"


class UnknownModel(NotFound):
    """No model of that name is served."""

    title = "No such model"


class UnknownSession(NotFound):
    """No session of that id is known."""

    title = "No such session"


class SessionGone(Problem):
    """The session existed, and was deleted, expired or evicted."""

    status = 410
    title = "The session is gone"


class Conflict(Problem):
    """The session is not in the state that the request assumes; nothing was applied."""

    status = 409


class PositionConflict(Conflict):
    """The session has moved past the position that the request starts from."""

    title = "The session is at another position"


class SessionWentBack(Conflict):
    """The session is behind the position that the request starts from."""

    title = "The session is behind the client"


class StepInFlight(Conflict):
    """A change with a position is in flight in the session."""

    title = "A change of the session is in flight"
    retry_after = 1


class SessionExists(Conflict):
    """Another request has created a session of that id."""

    title = "The session exists already"


class StateOfAnotherModel(Conflict):
    """The uploaded state was taken from another model."""

    title = "The state is another model's"


class MethodNotAllowed(Problem):
    """The path takes other methods."""

    status = 405
    title = "The path does not take this method"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Returns the headers of the answer (RFC 9110, section 15.5.6)."""
        allowed = self.extensions.get("allow")
        return [*super().headers(), *([(b"allow", allowed.encode())] if allowed else [])]


class Misdirected(Problem):
    """The request names a host that this server does not go by."""

    status = 421
    title = "The host is not this server"


class UpgradeRequired(Problem):
    """The path is a WebSocket, and was requested over plain HTTP."""

    status = 426
    title = "The path is a WebSocket"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Returns the headers of the answer (RFC 9110, sections 7.8 and 15.5.22)."""
        return [*super().headers(), (b"upgrade", b"websocket"), (b"connection", b"upgrade")]


class BodyTooLarge(Problem):
    """The body, or something in it, exceeds a configured limit."""

    status = 413
    title = "The request is too large"


class MalformedRequest(Problem):
    """The request is not HTTP, or could be understood in two ways (RFC 9112)."""

    status = 400
    title = "The request is malformed"


class RequestTimeout(Problem):
    """The client did not go on with its request in time."""

    status = 408
    title = "The request took too long to arrive"


class TargetTooLong(Problem):
    """The request's target is too long."""

    status = 414
    title = "The request's target is too long"


class HeadTooLarge(Problem):
    """The request's headers, or its trailers, are too many or too large."""

    status = 431
    title = "The request's headers are too large"


class TooManyConnections(Problem):
    """All connections, or those of one client, are taken."""

    status = 503
    title = "There are too many connections"
    retry_after = 1


class UnsupportedMediaType(Problem):
    """The path does not take the body's content type."""

    status = 415
    title = "The content type is not supported"


class ServerFull(Problem):
    """A limit on sessions or on loaded models is reached."""

    status = 503
    title = "The server is full"
    retry_after = 10


class ModelVersionNotHere(Problem):
    """The session belongs to a model version that this server does not have."""

    status = 503
    title = "The session's model is not served here"
    retry_after = 5


class VersionLoading(Problem):
    """The version is in the repository; this request has started loading it."""

    status = 503
    title = "The version is being loaded"
    retry_after = 1

    def __init__(self, key: tuple[str, int]) -> None:
        super().__init__(f"model: version {key[1]} of {key[0]!r} is being loaded: try again in a second")
        self.key = key


class RepositoryUnusable(Problem):
    """The model repository cannot be read, or is empty; the loaded models stay in use."""

    status = 503
    title = "The models cannot be read"
    retry_after = 5


class StaleSession(Problem):
    """Another server has changed the session since this one read it; the session must be read again first."""

    status = 503
    title = "The session was changed elsewhere"
    retry_after = 1
    wire_kind = "stale"

    def __init__(self, detail: str = "another server keeps changing the session: try again in a second") -> None:
        super().__init__(detail)


class StoreUnavailable(Problem):
    """The session store does not answer, or refuses; whether a pending write was applied is unknown."""

    status = 503
    title = "The session store is unavailable"
    retry_after = 1
    wire_kind = "store-away"

    def __init__(
        self,
        detail: str = "the session store cannot be used now: send the request again in a second (with its position, so "
        "that it is applied only once)",
    ) -> None:
        super().__init__(detail)


class DeviceLost(Problem):
    """The GPU does not answer this process any more; nothing was applied."""

    status = 503
    title = "The GPU was lost"
    retry_after = 10

    def __init__(
        self,
        detail: str = "the GPU of this server does not answer any more: nothing was applied; the server must be "
        "restarted, or send the request to another",
    ) -> None:
        super().__init__(detail)


class SessionUnreadable(Problem):
    """What the session store has of the session is not a session; other sessions are not affected."""

    status = 500
    title = "The session cannot be read"

    def __init__(
        self,
        detail: str = "what the session store has of this session is damaged, so that it can be neither read nor "
        "stepped: delete it",
    ) -> None:
        super().__init__(detail)


class ShuttingDown(Problem):
    """The server is stopping; applied changes are kept, and another server can continue."""

    status = 503
    title = "The server is stopping"
    retry_after = 1
    wire_kind = "stopping"


class QueueFull(Problem):
    """The limit on waiting work is reached."""

    status = 503
    title = "The server is overloaded"
    retry_after = 1


class ModelFailed(Problem):
    """ONNX Runtime could not run the model on this request; nothing was applied."""

    status = 500
    title = "The model could not be run"
