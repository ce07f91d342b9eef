"""The two forms of a stream, for threads and for asyncio; what they do is in `cellserve.streaming`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from cellserve.calls import Call, Pause, Request, drive, drive_async
from cellserve.errors import ConnectionLost
from cellserve.frames import Answered, Exchange
from cellserve.layout import Given, Outputs, Tensors
from cellserve.predictions import States
from cellserve.session import new_id
from cellserve.sessions import AsyncSession, Session
from cellserve.sockets import AsyncSocket, Socket
from cellserve.streaming import Streaming

if TYPE_CHECKING:
    from cellserve.client import AsyncClient, Client

T = TypeVar("T")


class StreamSession(Session):
    """A session of a `Stream`: its steps go over the socket; all else is as with any session, over HTTP."""

    def __init__(self, stream: Stream, *what: Any, **more: Any) -> None:
        super().__init__(stream.client, *what, **more)
        self._stream = stream

    def step(self, x: Given, outputs: Outputs | None = "all") -> Tensors:
        """Steps it by one time step `[*features]` or several `[time, *features]`; gives all their outputs."""
        return _only(self._stream.step([self], _alone(x), outputs))


class Stream(Streaming):
    """Many sessions over one socket; get one from `Client.stream`.

    The socket is opened when it is needed, and again when it is lost: then the sessions are attached anew, and what had
    no answer is sent again from the same positions, so that it is applied once. Threads may share it; those that step
    the same session take turns. At the end of its `with` block the sessions that it opened are deleted, unless `keep`.
    """

    def __init__(self, client: Client) -> None:
        super().__init__(client.retry)
        self.client = client
        self._socket: Socket | None = None
        self._opening = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            drive(self.left(failed=kind is not None), self._do)
        finally:
            self.close()

    def close(self) -> None:
        """Closes the socket; sessions live on."""
        with self._opening:
            if self._socket:
                self._socket.close(ConnectionLost("the stream was closed"))

    def open(
        self, model: str, states: States | None = None, session_id: str | None = None, keep: bool = False
    ) -> StreamSession:
        """Makes a session, as `Client.session` does; it is created at its first step, together with others."""
        session = StreamSession(self, session_id or new_id(), model, states, keep)
        self._owned(session)
        return session

    def attach(self, session_id: str) -> StreamSession:
        """Gives a session that exists, to go on from where it is."""
        return StreamSession(self, session_id, keep=True)

    def step(self, sessions: Sequence[Session], x: Given, outputs: Outputs | None = "all") -> Tensors:
        """Steps different sessions of one model, by as many time steps each, in one frame.

        Args:
            sessions: Of this stream.
            x: `[sessions, *features]`, or `[sessions, time, *features]`; of several inputs a dict, each by its name.
            outputs: Of several time steps, `all` or the `last`; None for the model's default.

        Returns:
            y, in the model's type (float32 mostly): `[sessions, *outputs]`, or `[sessions, time, *outputs]`; of several
            outputs a dict, each by its name.

        Raises:
            ValueError: x does not fit; none has been stepped.
            StepsFailed: Some could not be stepped; the others have been.
            CellserveError: None has been, all for the same reason (as `Session.step`).
        """
        with self.client.turns(sessions):
            return drive(self.stepped(sessions, x, outputs), self._do)

    def _link(self) -> object:
        return self._socket if self._socket and not self._socket.replies.ended else None

    def _do(self, wanted: Exchange | Request | Pause) -> Any:
        if not isinstance(wanted, Exchange):
            return self.client.do(wanted)
        with self._opening:
            if not self._link():
                self._socket = Socket(self.client.url, self.client.headers, self.client.timeout)
            socket = self._socket
        assert socket is not None
        if wanted.link not in (None, socket):
            raise ConnectionLost("the socket was opened anew meanwhile")
        return Answered(socket, socket.ask(wanted))


class AsyncStreamSession(AsyncSession):
    """A session of an `AsyncStream`: what StreamSession is, for asyncio."""

    def __init__(self, stream: AsyncStream, *what: Any, **more: Any) -> None:
        super().__init__(stream.client, *what, **more)
        self._stream = stream

    async def step(self, x: Given, outputs: Outputs | None = "all") -> Tensors:
        """Steps it, as `StreamSession.step` does."""
        return _only(await self._stream.step([self], _alone(x), outputs))


class AsyncStream(Streaming):
    """Many sessions over one socket: what Stream is, for asyncio. Frames of several tasks are under way at once."""

    def __init__(self, client: AsyncClient) -> None:
        super().__init__(client.retry)
        self.client = client
        self._socket: AsyncSocket | None = None
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            await self._drive(self.left(failed=kind is not None))
        finally:
            await self.close()

    async def close(self) -> None:
        """Closes the socket; sessions live on."""
        if self._socket:
            await self._socket.close(ConnectionLost("the stream was closed"))

    def open(
        self, model: str, states: States | None = None, session_id: str | None = None, keep: bool = False
    ) -> AsyncStreamSession:
        """Makes a session, as `Stream.open` does."""
        session = AsyncStreamSession(self, session_id or new_id(), model, states, keep)
        self._owned(session)
        return session

    def attach(self, session_id: str) -> AsyncStreamSession:
        """Gives a session that exists, to go on from where it is."""
        return AsyncStreamSession(self, session_id, keep=True)

    async def step(self, sessions: Sequence[AsyncSession], x: Given, outputs: Outputs | None = "all") -> Tensors:
        """Steps different sessions of one model in one frame, as `Stream.step` does."""
        async with self.client.turns(sessions):
            return await self._drive(self.stepped(sessions, x, outputs))

    def _link(self) -> object:
        return self._socket if self._socket and not self._socket.replies.ended else None

    async def _drive(self, call: Call[T]) -> T:
        return await drive_async(call, self._do)

    async def _do(self, wanted: Exchange | Request | Pause) -> Any:
        if not isinstance(wanted, Exchange):
            return await self.client.do(wanted)
        async with self._opening:
            if not self._link():
                self._socket = await AsyncSocket.opened(self.client.url, self.client.headers, self.client.timeout)
            socket = self._socket
        assert socket is not None
        if wanted.link not in (None, socket):
            raise ConnectionLost("the socket was opened anew meanwhile")
        return Answered(socket, await socket.ask(wanted))


def _alone(x: Given) -> Given:
    """Gives x with an axis for one session."""
    if isinstance(x, Mapping):
        return {name: np.asarray(tensor)[None] for name, tensor in x.items()}
    return np.asarray(x)[None]


def _only(y: Tensors) -> Tensors:
    """Gives the y of the only session."""
    return {name: tensor[0, ...] for name, tensor in y.items()} if isinstance(y, dict) else y[0, ...]
