"""The exceptions of the client, as a tree: catch at the level that you mean.

```
CellserveError
├── RetriesExhausted        no attempt was left; the cause is the error of the last one
├── ConnectionLost          no answer, or part of one (the cause of a RetriesExhausted)
│   └── NeverReached        no connection, and there never was one
├── UnexpectedAnswer        the URL does not speak the protocol of Cellserve
│   └── AnswerTooLarge      more than the client's `max_answer_bytes`
├── StepsFailed             some sessions of a frame could not be stepped
└── Problem                 the server's problem document (RFC 9457)
    ├── InvalidInput        the request does not fit: NotFinite, CannotBeStepped, CannotRollOut, BodyTooLarge
    ├── Unauthorized, Forbidden
    ├── NotFound            UnknownModel, UnknownSession
    ├── SessionGone         deleted, expired or evicted
    ├── Conflict            PositionConflict, SessionWentBack, StepInFlight, SessionExists, StateOfAnotherModel
    └── ServerProblem       5xx: ServerFull, VersionLoading, StoreAway, ModelFailed, ...
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_URN = "urn:cellserve:problem:"


class CellserveError(Exception):
    """The base of everything that the client raises, except ValueError for input that it does not send."""


class RetriesExhausted(CellserveError):
    """No attempt is left and there was no answer; `__cause__` is the error of the last attempt.

    A change that was under way may have been applied or not. The session keeps its last acknowledged position: the same
    call again is safe, since it is applied once. `refresh` reads the position from the server instead.

    Attributes:
        attempts: Number of attempts.
        seconds: Time they took together.
    """

    def __init__(self, attempts: int, seconds: float, last: CellserveError) -> None:
        super().__init__(
            f"gave up after {attempts} {'attempt' if attempts == 1 else 'attempts'} in {seconds:.1f} seconds: {last}"
        )
        self.attempts = attempts
        self.seconds = seconds
        self.__cause__ = last


GaveUp = RetriesExhausted  # the former name


class ConnectionLost(CellserveError):
    """There was no connection, no answer in time, or only part of an answer."""


class NeverReached(ConnectionLost):
    """No connection could be made, and this client has never had an answer of the server."""


class UnexpectedAnswer(CellserveError):
    """The server at the URL does not speak the protocol of Cellserve."""


class AnswerTooLarge(UnexpectedAnswer):
    """An answer has more bytes than the client's `max_answer_bytes`."""

    def __init__(self, most: int) -> None:
        super().__init__(
            f"the answer has more than {most} bytes: ask for less, or give the client a larger max_answer_bytes"
        )


class StepsFailed(CellserveError):
    """Some sessions of a frame could not be stepped; the others were, and their positions have moved.

    Attributes:
        failures: The error of each row that was not stepped.
        y: Outputs `[sessions, time, *outputs]` (a dict for several outputs), with zeros in the failed rows.
    """

    def __init__(self, failures: dict[int, CellserveError], count: int, y: Any) -> None:
        row, first = next(iter(failures.items()))
        super().__init__(f"{len(failures)} of {count} sessions could not be stepped; row {row}: {first}")
        self.failures = failures
        self.y = y


class Problem(CellserveError):
    """The server answered with a problem.

    Attributes:
        status: HTTP status.
        type: URN of the kind of problem.
        title: The kind of problem in a few words.
        detail: What was wrong, where, and what to send instead.
        extensions: Further members of the document.
        retry_after: Seconds after which the server asks to repeat the request; None if it does not say.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        type: str = "about:blank",
        title: str = "",
        extensions: Mapping[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{status} {title}: {detail}" if title else f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.type = type
        self.title = title
        self.extensions = dict(extensions or {})
        self.retry_after = retry_after


class InvalidInput(Problem):
    """The request is invalid; `extensions["place"]` says where."""


class NotFinite(InvalidInput):
    """The model's output or next state would not be finite; nothing was applied."""


class CannotBeStepped(InvalidInput):
    """The model takes whole sequences only, as `detail` explains: use `predict`, not sessions."""


class CannotRollOut(InvalidInput):
    """The model does not declare that its output can be its next input."""


class BodyTooLarge(InvalidInput):
    """The request exceeds a limit of the server: send it in parts."""


class Unauthorized(Problem):
    """The server requires a key, or another one."""


class Forbidden(Problem):
    """The server does not allow it."""


class NotFound(Problem):
    """Nothing has that name."""


class UnknownModel(NotFound):
    """No model with that name is served."""


class UnknownSession(NotFound):
    """No session with that id is known; a server that keeps sessions in memory was restarted, say."""


class SessionGone(Problem):
    """The session was deleted, expired or evicted; `extensions` has `reason` and `position`."""


class Conflict(Problem):
    """The session is not in the state that the request assumes; nothing was applied."""

    @property
    def position(self) -> int | None:
        """Position of the session; None if the server does not say."""
        position: int | None = self.extensions.get("position")
        return position


class PositionConflict(Conflict):
    """Another request has changed the session: someone else's, or one that raised RetriesExhausted."""


class SessionWentBack(Conflict):
    """The server's store has lost acknowledged changes: send the steps from `position` on again."""


class StepInFlight(Conflict):
    """A change of the session is under way: an earlier attempt of the same, or someone else's."""


class SessionExists(Conflict):
    """A session with that id exists, created by another request."""


class StateOfAnotherModel(Conflict):
    """The state belongs to another model, or to another version of it."""


class ServerProblem(Problem):
    """The server, or a load balancer in front of it, cannot answer now."""


class ServerFull(ServerProblem):
    """The server holds as many sessions as it may."""


class ModelVersionNotHere(ServerProblem):
    """The session is bound to a version of a model that the server does not have."""


class VersionLoading(ServerProblem):
    """The version is being loaded because a request asked for it."""


class StoreAway(ServerProblem):
    """The server's session store does not answer."""


class SessionUnreadable(ServerProblem):
    """What the server's session store has of the session is damaged: delete it, or create it again."""


class QueueFull(ServerProblem):
    """The queue is full."""


class ModelFailed(ServerProblem):
    """Running the model failed on this request; nothing was applied."""


class DeviceLost(ServerProblem):
    """The server's GPU is gone until it is restarted; nothing was applied."""


_BY_TYPE = {
    "not-finite": NotFinite,
    "cannot-be-stepped": CannotBeStepped,
    "cannot-roll-out": CannotRollOut,
    "body-too-large": BodyTooLarge,
    "unknown-model": UnknownModel,
    "unknown-session": UnknownSession,
    "position-conflict": PositionConflict,
    "session-went-back": SessionWentBack,
    "step-in-flight": StepInFlight,
    "session-exists": SessionExists,
    "state-of-another-model": StateOfAnotherModel,
    "server-full": ServerFull,
    "model-version-not-here": ModelVersionNotHere,
    "version-loading": VersionLoading,
    "store-away": StoreAway,
    "session-unreadable": SessionUnreadable,
    "queue-full": QueueFull,
    "model-failed": ModelFailed,
    "device-lost": DeviceLost,
}
_BY_STATUS: dict[int, type[Problem]] = {
    400: InvalidInput,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: SessionGone,
    413: InvalidInput,
    415: InvalidInput,
    422: InvalidInput,
}


def problem_of(document: Mapping[str, Any], retry_after: float | None = None) -> Problem:
    """Returns the error for a problem document; an unknown type becomes the class of its status."""
    members = dict(document)
    status, urn = int(members.pop("status", 500)), str(members.pop("type", "about:blank"))
    kind = (
        _BY_TYPE.get(urn.removeprefix(_URN)) or _BY_STATUS.get(status) or (ServerProblem if status >= 500 else Problem)
    )
    detail, title = str(members.pop("detail", "")), str(members.pop("title", ""))
    return kind(status, detail, urn, title, members, retry_after)


def problem_of_body(status: int, body: bytes, retry_after: float | None = None) -> Problem:
    """Returns the error for an answer that is not a success; the page of a load balancer has no problem document."""
    try:
        document = json.loads(body)
        return problem_of({"status": status, **document}, retry_after)
    except (ValueError, TypeError):
        return problem_of({"status": status, "detail": body[:200].decode(errors="replace").strip()}, retry_after)
