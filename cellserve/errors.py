"""All that the client raises, as a tree: catch at the level that you mean.

```
CellserveError
├── GaveUp                  the tries came to their end; the cause is the last one's
├── ConnectionLost          no answer, or half of one (the cause of a GaveUp)
├── UnexpectedAnswer        what answers does not speak Cellserve's protocol
├── StepsFailed             some of the sessions of a frame could not be stepped
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
    """Whatever the client raises."""


class GaveUp(CellserveError):
    """The tries came to their end without an answer; `__cause__` is what ended the last one.

    A change that was under way may have been applied or not. The session stays at the position that it had been told
    of: the very same call again is safe, it is applied once. `refresh` asks the server instead.

    Attributes:
        attempts: How many tries there were.
        seconds: How long they took.
    """

    def __init__(self, attempts: int, seconds: float, last: CellserveError) -> None:
        super().__init__(
            f"given up after {attempts} {'try' if attempts == 1 else 'tries'} in {seconds:.1f} seconds: {last}"
        )
        self.attempts = attempts
        self.seconds = seconds
        self.__cause__ = last


class ConnectionLost(CellserveError):
    """There was no connection, no answer in time, or half of one."""


class UnexpectedAnswer(CellserveError):
    """What answers at the URL does not speak Cellserve's protocol."""


class StepsFailed(CellserveError):
    """Some sessions of a frame could not be stepped; the others have been, and their positions have moved.

    Attributes:
        failures: Why, by row.
        y: The outputs by row, `[sessions, time, *outputs]` (of several outputs a dict); zeros where there are none.
    """

    def __init__(self, failures: dict[int, CellserveError], count: int, y: Any) -> None:
        row, first = next(iter(failures.items()))
        super().__init__(f"{len(failures)} of {count} sessions could not be stepped; row {row}: {first}")
        self.failures = failures
        self.y = y


class Problem(CellserveError):
    """The server answered with a problem.

    Attributes:
        status: Of HTTP.
        type: The problem's URN.
        title: What it is, in a few words.
        detail: What was wrong, where, and what to send instead.
        extensions: The document's further members.
        retry_after: After how many seconds the server wants to be asked again, where it says so.
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
    """The request does not fit; `extensions["place"]` says where."""


class NotFinite(InvalidInput):
    """The model's output or next state would not be finite; nothing was applied."""


class CannotBeStepped(InvalidInput):
    """The model takes whole sequences only, `detail` says why: `predict` serves it, sessions do not."""


class CannotRollOut(InvalidInput):
    """The model does not say that its output can be its next input."""


class BodyTooLarge(InvalidInput):
    """The request is over a limit of the server's: send it in parts."""


class Unauthorized(Problem):
    """The server wants a key, or another one."""


class Forbidden(Problem):
    """The server does not allow it."""


class NotFound(Problem):
    """There is nothing of that name."""


class UnknownModel(NotFound):
    """No model of that name is served."""


class UnknownSession(NotFound):
    """No session of that id is known: a server without a store or a snapshot has been started again, say."""


class SessionGone(Problem):
    """The session was deleted, has expired or was evicted: `extensions` has `reason` and `position`."""


class Conflict(Problem):
    """The session is not as the request takes it to be; nothing was applied."""

    @property
    def position(self) -> int | None:
        """Where the session is, where the server says so."""
        position: int | None = self.extensions.get("position")
        return position


class PositionConflict(Conflict):
    """The session has gone on by another request than this one: someone else moves it, or a change was given up."""


class SessionWentBack(Conflict):
    """The server's store has lost changes that it had acknowledged: send the steps from `position` on again."""


class StepInFlight(Conflict):
    """A change is under way in the session: an earlier try of the same, or someone else's."""


class SessionExists(Conflict):
    """There is a session of that id, which another request has made."""


class StateOfAnotherModel(Conflict):
    """The state was taken from another model, or another version of it."""


class ServerProblem(Problem):
    """The server, or what stands before it, cannot answer now."""


class ServerFull(ServerProblem):
    """There are as many sessions as may be."""


class ModelVersionNotHere(ServerProblem):
    """The session is bound to a version of a model that the server has not."""


class VersionLoading(ServerProblem):
    """The version is being loaded, since a request has asked for it."""


class StoreAway(ServerProblem):
    """The server's store of sessions does not answer."""


class QueueFull(ServerProblem):
    """More work is waiting than may wait."""


class ModelFailed(ServerProblem):
    """The model could not be run on this request; nothing was applied."""


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
    "queue-full": QueueFull,
    "model-failed": ModelFailed,
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
    """Makes the error of a problem document; types that are not known here become the class of their status."""
    told = dict(document)
    status, urn = int(told.pop("status", 500)), str(told.pop("type", "about:blank"))
    kind = (
        _BY_TYPE.get(urn.removeprefix(_URN)) or _BY_STATUS.get(status) or (ServerProblem if status >= 500 else Problem)
    )
    detail, title = str(told.pop("detail", "")), str(told.pop("title", ""))
    return kind(status, detail, urn, title, told, retry_after)


def problem_of_body(status: int, body: bytes, retry_after: float | None = None) -> Problem:
    """Makes the error of an answer that is no success, by whomever; a balancer's page has no document."""
    try:
        document = json.loads(body)
        return problem_of({"status": status, **document}, retry_after)
    except (ValueError, TypeError):
        return problem_of({"status": status, "detail": body[:200].decode(errors="replace").strip()}, retry_after)
