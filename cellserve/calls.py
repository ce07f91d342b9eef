"""What the client does, without the doing: a call is a generator, yields what is to be done, is sent what came of it.

One call serves both clients: `drive` and `drive_async` are all that differs. (The habit: "sans-IO",
https://sans-io.readthedocs.io.)
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

from cellserve.errors import CellserveError, UnexpectedAnswer, problem_of_body
from cellserve.retry import Retry, Tries, retry_after

T = TypeVar("T")
SAFETENSORS = "application/x-safetensors"
_PAGE = 1000  # sessions, as many as the server gives at once


@dataclass(frozen=True, slots=True)
class Request:
    """To be sent over HTTP; what came of it is a Reply."""

    method: str
    path: str
    content: bytes = b""
    media_type: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """What was answered over HTTP."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> dict[str, Any]:
        """Gives the document; raises UnexpectedAnswer where it is none."""
        try:
            document: dict[str, Any] = json.loads(self.content)
            return document
        except ValueError:
            raise UnexpectedAnswer(f"the answer is no JSON: {self.content[:100]!r}: is this Cellserve's URL?") from None


@dataclass(frozen=True, slots=True)
class Pause:
    """To be waited for."""

    seconds: float


Call = Generator[Any, Any, T]


def drive(call: Call[T], do: Callable[[Any], Any]) -> T:
    """Runs a call to its end."""
    try:
        wanted = next(call)
        while True:
            try:
                done = do(wanted)
            except CellserveError as error:
                wanted = call.throw(error)
            else:
                wanted = call.send(done)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        call.close()


async def drive_async(call: Call[T], do: Callable[[Any], Awaitable[Any]]) -> T:
    """Runs a call to its end."""
    try:
        wanted = next(call)
        while True:
            try:
                done = await do(wanted)
            except CellserveError as error:
                wanted = call.throw(error)
            else:
                wanted = call.send(done)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        call.close()


def json_request(method: str, path: str, document: Any) -> Request:
    """Makes a request with a JSON body."""
    return Request(method, path, json.dumps(document).encode(), "application/json")


def path_of(*parts: str) -> str:
    """Makes a path of names."""
    return "/" + "/".join(quote(part, safe="") for part in parts)


def exchange(request: Request, retry: Retry) -> Call[Reply]:
    """Sends a request until it is answered.

    Raises:
        Problem: It was answered with one.
        GaveUp: It was not answered.
    """
    tries = Tries(retry)
    while True:
        try:
            reply: Reply = yield request
            return answered(reply)
        except CellserveError as error:
            wait = tries.pause(error)
        yield Pause(wait)


def answered(reply: Reply) -> Reply:
    """Gives an answer back, or raises the problem that it is."""
    if reply.status < 300:
        return reply
    raise problem_of_body(reply.status, reply.content, retry_after(reply.headers.get("retry-after")))


def models(retry: Retry) -> Call[list[dict[str, Any]]]:
    """Lists the models."""
    reply = yield from exchange(Request("GET", "/models"), retry)
    listed: list[dict[str, Any]] = reply.json()["models"]
    return listed


def only_model(retry: Retry) -> Call[str | None]:
    """Gives the name of the model that is served; None where there are several."""
    listed = yield from models(retry)
    return listed[0]["name"] if len(listed) == 1 else None


def model(name: str, retry: Retry) -> Call[dict[str, Any]]:
    """Describes a model."""
    reply = yield from exchange(Request("GET", path_of("models", name)), retry)
    return reply.json()


def sessions(after: str | None, retry: Retry) -> Call[tuple[list[dict[str, Any]], str | None]]:
    """Gives a page of the sessions, and what comes after it."""
    params = {"limit": str(_PAGE)} | ({} if after is None else {"after": after})
    page = (yield from exchange(Request("GET", "/sessions", params=params), retry)).json()
    return page["sessions"], page["next"]


def ready() -> Call[bool]:
    """Says whether the server takes requests; asks once."""
    try:
        reply: Reply = yield Request("GET", "/readyz")
    except CellserveError:
        return False
    return reply.status == 200
