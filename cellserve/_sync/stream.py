# Generated from _async/stream.py by scripts/unasync.py: edit that file.
"""A stream: many sessions stepped over one WebSocket, which is reopened when it is lost."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from cellserve._sync.concurrency import Lock, sleep
from cellserve._sync.session import Session
from cellserve._sync.socket import Socket
from cellserve._sync.transport import Transport
from cellserve.errors import CellserveError, ConnectionLost, Problem, SessionGone, UnexpectedAnswer, UnknownSession
from cellserve.protocol.frames import Answer, Frame, Stepped, text_frame
from cellserve.protocol.session import SessionRecord, new_id
from cellserve.protocol.step_batch import StepBatch
from cellserve.retry import ONCE, Backoff, Retry, is_retryable
from cellserve.signatures import Signature
from cellserve.tensors import Outputs, States, TensorLike, Tensors, add_session_axis, drop_session_axis


class Stream:
    """Many sessions over one socket; get one from `Client.stream`.

    The socket is opened when it is needed, and reopened when it is lost: the sessions are attached again, and frames
    without an answer are repeated from the same positions, so that they are applied once. Threads may share a stream
    and have frames under way at once; those that step the same session take turns. The end of a `with` block deletes
    the sessions that the stream opened, unless `keep` is set.

    Args:
        transport: Transport of the client.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._socket: Socket | None = None
        self._opening = Lock()
        self._to_delete: dict[str, SessionRecord] = {}  # by id, at the end of the `with` block

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._delete_sessions(self._transport.retry if kind is None else ONCE)
        except CellserveError:
            if kind is None:  # otherwise the error that ended the block is raised
                raise
        finally:
            self.close()

    def close(self) -> None:
        """Closes the socket; the sessions stay."""
        with self._opening:
            if self._socket:
                self._socket.close(ConnectionLost("the stream was closed"))

    def open(
        self, model: str, states: States | None = None, session_id: str | None = None, keep: bool = False
    ) -> StreamSession:
        """Returns a new session, as `Client.session` does; it is created at its first step."""
        record = SessionRecord(session_id or new_id(), model, states, keep)
        self._to_delete[record.id] = record
        return StreamSession(self, record)

    def attach(self, session_id: str) -> StreamSession:
        """Returns a session that exists; it continues from its current position."""
        return StreamSession(self, SessionRecord(session_id, keep=True))

    def step(self, sessions: Sequence[Session], x: TensorLike, outputs: Outputs | None = "all") -> Tensors:
        """Steps different sessions of one model in one frame, each by the same number of time steps.

        Args:
            sessions: Sessions of this stream.
            x: `[sessions, *features]`, or `[sessions, time, *features]`; several inputs as a dict by name.
            outputs: `all` or the `last` of several time steps; None for the model's default.

        Returns:
            y in the model's type (mostly float32): `[sessions, *outputs]`, or `[sessions, time, *outputs]`. Several
            outputs are a dict by name.

        Raises:
            ValueError: x does not fit; no session was stepped.
            StepsFailed: Some sessions could not be stepped; the others were.
            CellserveError: No session was stepped, all for the same reason (as in `Session.step`).
        """
        batch = StepBatch([session._record for session in sessions], x)
        with self._transport.locks.hold(batch.sessions):
            self._step_with_retries(batch)
            batch.raise_failures()
            return batch.outputs(outputs or self._signature(batch.sessions[0]).default_output)

    def _step_with_retries(self, batch: StepBatch) -> None:
        """Steps all rows, repeating those without an answer; what cannot be stepped is in the batch's failures."""
        rows, backoff = list(range(len(batch.sessions))), Backoff(self._transport.retry)
        while rows:
            try:
                problems = self._step_once(batch, rows)
            except CellserveError as error:
                problems = dict.fromkeys(rows, error)
            batch.failures |= {row: error for row, error in problems.items() if not is_retryable(error)}
            rows = [row for row, error in problems.items() if is_retryable(error)]
            if not rows:
                return
            try:
                delay = backoff.delay_after(problems[rows[0]])
            except CellserveError as exhausted:
                batch.failures |= dict.fromkeys(rows, exhausted)
                return
            sleep(delay)

    def _step_once(self, batch: StepBatch, rows: list[int]) -> dict[int, CellserveError]:
        """Sends one frame for some rows; returns why rows were not stepped."""
        socket, problems = self._attach(batch.sessions, rows)
        rows = [row for row in rows if row not in problems]
        if not rows:
            return problems
        if not batch.has_layout:
            batch.lay_out(self._signature(batch.sessions[rows[0]]))
        _, (answer,) = self._ask([batch.frame(rows)], socket)
        if isinstance(answer, CellserveError):
            raise answer
        if not isinstance(answer, Stepped):
            raise UnexpectedAnswer(f"a frame is not the answer to a step: {answer}")
        return problems | batch.receive(rows, answer)

    def _attach(
        self, sessions: Sequence[SessionRecord], rows: list[int]
    ) -> tuple[Socket | None, dict[int, CellserveError]]:
        """Gives the sessions of some rows handles on the socket; returns the socket, and why rows have no handle."""
        socket = self._open_socket()
        problems: dict[int, CellserveError] = {}
        rows = [row for row in rows if socket is None or sessions[row].socket is not socket]
        if rows:
            socket, answers = self._ask([sessions[row].open_frame() for row in rows], socket)
            for row, answer in zip(rows, answers, strict=True):
                if isinstance(answer, dict):
                    sessions[row].attach(socket, answer)
                elif isinstance(answer, Problem):
                    problems[row] = answer
        return socket, problems

    def _ask(self, frames: Sequence[Frame], expected: Socket | None = None) -> tuple[Socket, list[Answer]]:
        """Sends frames; raises ConnectionLost if the open socket is not the expected one, whose handles they have."""
        with self._opening:
            socket = self._open_socket()
            if socket is None:
                socket = self._socket = self._transport.open_socket()
        if expected not in (None, socket):
            raise ConnectionLost("the socket was reopened meanwhile")
        return socket, socket.ask(frames)

    def _open_socket(self) -> Socket | None:
        return self._socket if self._socket and not self._socket.has_ended else None

    def _signature(self, session: SessionRecord) -> Signature:
        self._transport.open(session)
        assert session.model is not None
        return self._transport.signature(session.model, session.version)

    def _delete_sessions(self, retry: Retry) -> None:
        backoff = Backoff(retry)
        while sessions := [one for one in self._to_delete.values() if not one.keep and one.position is not None]:
            try:
                _, answers = self._ask([text_frame(op="close", session=one.id) for one in sessions])
                failed: CellserveError | None = None
                for session, answer in zip(sessions, answers, strict=True):
                    if isinstance(answer, CellserveError) and not isinstance(answer, SessionGone | UnknownSession):
                        failed = answer
                    else:
                        del self._to_delete[session.id]
                if failed is None:
                    return
                raise failed
            except CellserveError as error:
                delay = backoff.delay_after(error)
            sleep(delay)


class StreamSession(Session):
    """A session of an `Stream`. Its steps go over the socket; everything else goes over HTTP."""

    def __init__(self, stream: Stream, record: SessionRecord) -> None:
        super().__init__(stream._transport, record)
        self._stream = stream

    def step(self, x: TensorLike, outputs: Outputs | None = "all") -> Tensors:
        """Steps the session by one time step `[*features]` or several `[time, *features]`; returns all outputs."""
        return drop_session_axis(self._stream.step([self], add_session_axis(x), outputs))

    def _delete(self, retry: Retry) -> None:
        super()._delete(retry)
        self._stream._to_delete.pop(self.id, None)
