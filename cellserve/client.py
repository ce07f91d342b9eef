"""`Client` and `AsyncClient`: a server of Cellserve from Python, NumPy in and NumPy out, each change applied once.

The two are one client in two forms: what is sent and how it is tried again is in `calls`, `session` and `frames`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import httpx
import numpy as np
from numpy.typing import ArrayLike

from cellserve import calls
from cellserve.calls import Call, Pause, Reply, Request
from cellserve.errors import ConnectionLost
from cellserve.events import AsyncEvents, Events, Leave, Listen, Next
from cellserve.layout import Given, Outputs, Tensors
from cellserve.numbers import Array
from cellserve.predictions import Prediction, States, predict
from cellserve.retry import Retry, Timeout
from cellserve.session import new_id
from cellserve.sessions import AsyncSession, Session
from cellserve.signatures import Signatures
from cellserve.stream import AsyncStream, Stream
from cellserve.turns import AsyncTurns, Turns

T = TypeVar("T")
One = Prediction[Tensors, dict[str, Array] | None]
Many = Prediction[list[Tensors], list[dict[str, Array]] | None]


class Client:
    """A client for threads; it may be shared by many.

    Args:
        url: Of the server, or of a balancer before several that share a store.
        api_key: Where the server wants one.
        timeout: For how long one try waits; a number of seconds for an answer.
        retry: How a request without an answer is tried again.

    Example:
        ```python
        with Client("http://127.0.0.1:8000") as client, client.session("vowels") as session:
            for x in frames:  # [features]
                y = session.step(x)
        ```
    """

    def __init__(
        self, url: str, api_key: str | None = None, timeout: Timeout | float | None = None, retry: Retry | None = None
    ) -> None:
        self.url = _checked(url)
        self.headers = _headers(api_key)
        self.timeout = _timeout(timeout)
        self.retry = retry or Retry()
        self.signatures = Signatures(self.retry)
        self.turns = Turns()
        self._http = httpx.Client(base_url=self.url, headers=self.headers, timeout=_httpx_timeout(self.timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections; sessions live on."""
        self._http.close()

    @overload
    def predict(
        self,
        model: str | None,
        sequences: Array | Mapping[str, ArrayLike],
        outputs: Outputs | None = None,
        states: States | None = None,
        return_states: bool = False,
    ) -> One: ...

    @overload
    def predict(
        self,
        model: str | None,
        sequences: Sequence[Given],
        outputs: Outputs | None = None,
        states: Sequence[States | None] | None = None,
        return_states: bool = False,
    ) -> Many: ...

    def predict(
        self,
        model: str | None,
        sequences: Array | Mapping[str, ArrayLike] | Sequence[Given],
        outputs: Outputs | None = None,
        states: States | Sequence[States | None] | None = None,
        return_states: bool = False,
    ) -> Any:
        """Runs a model over whole sequences.

        Args:
            model: Its name, or `NAME:VERSION`; None where one is served.
            sequences: One array `[time, *features]`, or a list of them, which may differ in length; of several inputs
                a dict in place of the array, each by its name. Integers where the model takes them.
            outputs: Those of `all` time steps or the `last`; None for the model's default.
            states: To begin from, `{name: [*shape]}` for each sequence (or None for zeros); None for zeros.
            return_states: Whether the last states are wanted.

        Raises:
            Problem: The server cannot do it, and says why.
            GaveUp: There was no answer.
        """
        return self.run(predict(self.signatures, model, sequences, outputs, states, return_states, self.retry))

    def session(
        self, model: str, states: States | None = None, session_id: str | None = None, keep: bool = False
    ) -> Session:
        """Makes a session; it is created when its `with` block is entered, or at its first use.

        Args:
            model: Its model's name, or `NAME:VERSION`; without a version it is the newest, and stays that one.
            states: To begin from, `{name: [*shape]}`; None for zeros.
            session_id: Its id, of letters, digits, `-`, `.`, `_` and `~`; None draws one.
            keep: Whether it outlives its `with` block.
        """
        return Session(self, session_id or new_id(), model, states, keep)

    def attach(self, session_id: str) -> Session:
        """Gives a session that exists, to go on from where it is; it outlives its `with` block."""
        return Session(self, session_id, keep=True)

    def stream(self) -> Stream:
        """Makes a stream: many sessions stepped over one socket; it is opened when it is needed."""
        return Stream(self)

    def sessions(self) -> Iterator[dict[str, Any]]:
        """Lists the sessions (of the key's owner) as they are asked for: session, model, version, position."""
        page, after = self.run(calls.sessions(None, self.retry))
        yield from page
        while after is not None:
            page, after = self.run(calls.sessions(after, self.retry))
            yield from page

    def models(self) -> list[dict[str, Any]]:
        """Lists the models: name, version, description, and how each version stands."""
        return self.run(calls.models(self.retry))

    def labels(self, model: str) -> Array:
        """Gives the names of the entries of a model's (first) output; empty where it has none. They are read once.

        Args:
            model: Its name, or `NAME:VERSION`.

        Returns:
            An array of strings: `labels[y.argmax(-1)]` is the name of the largest entry of each time step.
        """
        return np.array(self.run(self.signatures.of(model)).labels, np.str_)

    def model(self, name: str) -> dict[str, Any]:
        """Describes a model: signature, labels, metrics, exactness, as `GET /models/{name}` does."""
        return self.run(calls.model(name, self.retry))

    def ready(self) -> bool:
        """Says whether the server takes requests; asks once."""
        return self.run(calls.ready())

    def run(self, call: Call[T]) -> T:
        """Runs a call to its end."""
        return calls.drive(call, self.do)

    def do(self, wanted: Request | Pause | Listen | Next | Leave) -> Any:
        """Does what a call wants; raises ConnectionLost."""
        if isinstance(wanted, Pause):
            time.sleep(wanted.seconds)
            return None
        try:
            if isinstance(wanted, Listen):
                return self._listen(wanted.request)
            if isinstance(wanted, Next):
                return wanted.events.next()
            if isinstance(wanted, Leave):
                wanted.events.close()
                return None
            return _reply(self._http.request(wanted.method, wanted.path, **_parts(wanted)))
        except httpx.TransportError as error:
            raise _lost(error, self.url) from error

    def _listen(self, request: Request) -> Reply | Events:
        asked = self._http.build_request(request.method, request.path, **_parts(request))
        response = self._http.send(asked, stream=True)
        if response.status_code < 300:
            return Events(response)
        response.read()
        return _reply(response)


class AsyncClient:
    """A client for asyncio: what Client is. It belongs to one event loop.

    Args:
        url: Of the server, or of a balancer before several that share a store.
        api_key: Where the server wants one.
        timeout: For how long one try waits; a number of seconds for an answer.
        retry: How a request without an answer is tried again.

    Example:
        ```python
        async with AsyncClient("http://127.0.0.1:8000") as client, client.session("vowels") as session:
            for x in frames:  # [features]
                y = await session.step(x)
        ```
    """

    def __init__(
        self, url: str, api_key: str | None = None, timeout: Timeout | float | None = None, retry: Retry | None = None
    ) -> None:
        self.url = _checked(url)
        self.headers = _headers(api_key)
        self.timeout = _timeout(timeout)
        self.retry = retry or Retry()
        self.signatures = Signatures(self.retry)
        self.turns = AsyncTurns()
        self._http = httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=_httpx_timeout(self.timeout))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes its connections; sessions live on."""
        await self._http.aclose()

    @overload
    async def predict(
        self,
        model: str | None,
        sequences: Array | Mapping[str, ArrayLike],
        outputs: Outputs | None = None,
        states: States | None = None,
        return_states: bool = False,
    ) -> One: ...

    @overload
    async def predict(
        self,
        model: str | None,
        sequences: Sequence[Given],
        outputs: Outputs | None = None,
        states: Sequence[States | None] | None = None,
        return_states: bool = False,
    ) -> Many: ...

    async def predict(
        self,
        model: str | None,
        sequences: Array | Mapping[str, ArrayLike] | Sequence[Given],
        outputs: Outputs | None = None,
        states: States | Sequence[States | None] | None = None,
        return_states: bool = False,
    ) -> Any:
        """Runs a model over whole sequences, as `Client.predict` does."""
        return await self.run(predict(self.signatures, model, sequences, outputs, states, return_states, self.retry))

    def session(
        self, model: str, states: States | None = None, session_id: str | None = None, keep: bool = False
    ) -> AsyncSession:
        """Makes a session, as `Client.session` does."""
        return AsyncSession(self, session_id or new_id(), model, states, keep)

    def attach(self, session_id: str) -> AsyncSession:
        """Gives a session that exists, as `Client.attach` does."""
        return AsyncSession(self, session_id, keep=True)

    def stream(self) -> AsyncStream:
        """Makes a stream: many sessions stepped over one socket; it is opened when it is needed."""
        return AsyncStream(self)

    async def sessions(self) -> AsyncIterator[dict[str, Any]]:
        """Lists the sessions, as `Client.sessions` does."""
        page, after = await self.run(calls.sessions(None, self.retry))
        for one in page:
            yield one
        while after is not None:
            page, after = await self.run(calls.sessions(after, self.retry))
            for one in page:
                yield one

    async def models(self) -> list[dict[str, Any]]:
        """Lists the models, as `Client.models` does."""
        return await self.run(calls.models(self.retry))

    async def labels(self, model: str) -> Array:
        """Gives the names of the entries of a model's output, as `Client.labels` does."""
        return np.array((await self.run(self.signatures.of(model))).labels, np.str_)

    async def model(self, name: str) -> dict[str, Any]:
        """Describes a model: signature, labels, metrics, exactness, as `GET /models/{name}` does."""
        return await self.run(calls.model(name, self.retry))

    async def ready(self) -> bool:
        """Says whether the server takes requests; asks once."""
        return await self.run(calls.ready())

    async def run(self, call: Call[T]) -> T:
        """Runs a call to its end."""
        return await calls.drive_async(call, self.do)

    async def do(self, wanted: Request | Pause | Listen | Next | Leave) -> Any:
        """Does what a call wants; raises ConnectionLost."""
        if isinstance(wanted, Pause):
            await asyncio.sleep(wanted.seconds)
            return None
        try:
            if isinstance(wanted, Listen):
                return await self._listen(wanted.request)
            if isinstance(wanted, Next):
                return await wanted.events.next()
            if isinstance(wanted, Leave):
                await wanted.events.close()
                return None
            return _reply(await self._http.request(wanted.method, wanted.path, **_parts(wanted)))
        except httpx.TransportError as error:
            raise _lost(error, self.url) from error

    async def _listen(self, request: Request) -> Reply | AsyncEvents:
        asked = self._http.build_request(request.method, request.path, **_parts(request))
        response = await self._http.send(asked, stream=True)
        if response.status_code < 300:
            return AsyncEvents(response)
        await response.aread()
        return _reply(response)


def _checked(url: str) -> str:
    if httpx.URL(url).scheme not in ("http", "https") or not httpx.URL(url).host:
        raise ValueError(f"url: {url!r} is none of a server: give one like http://127.0.0.1:8000")
    return url.rstrip("/")


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"authorization": f"Bearer {api_key}"}


def _timeout(timeout: Timeout | float | None) -> Timeout:
    if timeout is None:
        return Timeout()
    return timeout if isinstance(timeout, Timeout) else Timeout(answer=timeout)


def _httpx_timeout(timeout: Timeout) -> httpx.Timeout:
    # Not for a connection of the pool: its end is that of the requests before.
    return httpx.Timeout(timeout.answer, connect=timeout.connect, pool=None)


def _parts(request: Request) -> dict[str, Any]:
    headers = {"content-type": request.media_type} if request.media_type else {}
    return {"params": request.params, "content": request.content, "headers": headers | dict(request.headers)}


def _reply(response: httpx.Response) -> Reply:
    return Reply(response.status_code, response.headers, response.content)


def _lost(error: httpx.TransportError, url: str) -> Exception:
    if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
        return ValueError(f"the request cannot be sent: {error}")  # a key with a line break in it, say
    return ConnectionLost(f"{url}: {str(error) or type(error).__name__}")
