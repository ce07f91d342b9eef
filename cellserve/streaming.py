"""What a stream does, without the doing: sessions are attached to a socket and stepped, and again on the next one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellserve.calls import Call, Pause
from cellserve.errors import CellserveError, Problem, SessionGone, StepsFailed, UnexpectedAnswer, UnknownSession
from cellserve.frames import Answered, Exchange, Frame, Stepped, step_frame, text_frame
from cellserve.layout import Given, Layout, Outputs, Tensors, listed
from cellserve.retry import ONCE, Retry, Tries, is_passing
from cellserve.session import SessionCalls
from cellserve.signatures import Signature


class Streaming:
    """Many sessions on one socket.

    Args:
        retry: How a frame without an answer is tried again.
    """

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._own: dict[str, SessionCalls] = {}  # by id: those to be deleted at the end

    def stepped(self, sessions: Sequence[SessionCalls], x: Given, outputs: Outputs | None) -> Call[Tensors]:
        """Steps different sessions of one model at once; what had no answer is sent again from the same positions."""
        if not sessions:
            raise ValueError("sessions: empty: give at least one")
        if len({id(session) for session in sessions}) < len(sessions):
            raise ValueError("sessions: one is there twice: give its time steps side by side, or call twice")
        batch = _Batch(sessions, x)
        failures: dict[int, CellserveError] = {}
        rows, tries = list(range(len(sessions))), Tries(self._retry)
        while True:
            try:
                refused = yield from self._try(batch, rows)
            except CellserveError as error:
                refused = dict.fromkeys(rows, error)
            failures |= {row: error for row, error in refused.items() if not is_passing(error)}
            passing = {row: error for row, error in refused.items() if is_passing(error)}
            if not passing:
                break
            rows = list(passing)
            try:
                wait = tries.pause(passing[rows[0]])
            except CellserveError as gave_up:
                failures |= dict.fromkeys(rows, gave_up)
                break
            yield Pause(wait)
        if failures:
            first = next(iter(failures.values()))
            if len(failures) == len(sessions) and all(error is first for error in failures.values()):
                raise first
            raise StepsFailed(failures, len(sessions), batch.outputs())
        return batch.outputs(outputs or (yield from sessions[0].signature()).default_output)

    def _owned(self, session: SessionCalls) -> None:
        """Takes charge of deleting a session in the end."""
        self._own[session.id], session._siblings = session, self._own

    def left(self, failed: bool) -> Call[None]:
        """Deletes the sessions that it has opened and that are not to be kept; where an error ended it, tries once."""
        tries = Tries(ONCE if failed else self._retry)
        while own := [one for one in self._own.values() if not one.keep and one._position is not None]:
            try:
                told: Answered = yield Exchange([text_frame(op="close", session=one.id) for one in own])
                left: CellserveError | None = None
                for session, answer in zip(own, told.answers, strict=True):
                    if isinstance(answer, CellserveError) and not isinstance(answer, SessionGone | UnknownSession):
                        left = answer
                    else:
                        del self._own[session.id]
                if left is None:
                    return
                raise left
            except CellserveError as error:
                try:
                    wait = tries.pause(error)
                except CellserveError:
                    if failed:
                        return
                    raise
            yield Pause(wait)

    def _link(self) -> object:
        """Gives the socket that is open; None where there is none."""
        raise NotImplementedError

    def _try(self, batch: _Batch, rows: list[int]) -> Call[dict[int, CellserveError]]:
        """Sends one frame for some sessions of a batch; gives why some have not moved, by row."""
        link, refused = yield from self._attached(batch.sessions, rows)
        rows = [row for row in rows if row not in refused]
        if not rows:
            return refused
        here = [batch.sessions[row] for row in rows]
        if batch.layout is None:
            batch.lay_out((yield from here[0].signature()))
        frame = step_frame([one._handle[1] for one in here], [one.position for one in here], batch.x[rows])
        told: Answered = yield Exchange([frame], link)
        (answer,) = told.answers
        if not isinstance(answer, Stepped):
            raise (
                answer if isinstance(answer, CellserveError) else CellserveError(f"not the answer to a step: {answer}")
            )
        batch.take(rows, answer)
        for row, (session, position) in enumerate(zip(here, answer.positions, strict=True)):
            if row not in answer.problems:
                session._position = position
        return refused | {rows[row]: problem for row, problem in answer.problems.items()}

    def _attached(
        self, sessions: Sequence[SessionCalls], rows: list[int]
    ) -> Call[tuple[object, dict[int, CellserveError]]]:
        """Sees to it that sessions have handles on the socket; gives the socket, and why some have none, by row."""
        link = self._link()
        refused: dict[int, CellserveError] = {}
        rows = [row for row in rows if link is None or sessions[row]._handle[0] is not link]
        if rows:
            told: Answered = yield Exchange([_attach(sessions[row]) for row in rows], link)
            link = told.link
            for row, answer in zip(rows, told.answers, strict=True):
                if isinstance(answer, dict):
                    sessions[row]._attached(link, answer)
                elif isinstance(answer, Problem):
                    refused[row] = answer
        return link, refused


class _Batch:
    """Sessions that are stepped together, what goes in and what came out, by row.

    Attributes:
        layout: Of the outputs; None until a session is attached, whose model tells it.
        x: `[sessions, time, ...]`, as the inputs lie in a frame.
        y: `[sessions, time, ...]`, zeros where nothing came yet.
    """

    def __init__(self, sessions: Sequence[SessionCalls], x: Given) -> None:
        self.sessions = sessions
        self.layout: Layout | None = None
        self.x = self.y = np.zeros((len(sessions), 1, 0), np.float32)
        self._given = x
        self._single = False

    def lay_out(self, signature: Signature) -> None:
        """Reads what was given; raises ValueError where it does not fit the model."""
        self.x, self._single = signature.inputs.batched(self._given, len(self.sessions))
        self.layout = signature.outputs
        self.y = self.layout.zeros(*self.x.shape[:2])

    def take(self, rows: list[int], stepped: Stepped) -> None:
        """Takes the answer to a frame with these rows."""
        shape = len(rows), *self.y.shape[1:]
        try:
            self.y[rows] = np.frombuffer(stepped.y, self.y.dtype.newbyteorder("<")).reshape(shape)
        except ValueError as error:
            raise UnexpectedAnswer(f"a frame of y that is not {list(shape)}: {error}") from None

    def outputs(self, wanted: Outputs | None = None) -> Tensors:
        """Gives y; of all time steps with their axis, unless there was none, or the last."""
        y = self.y if wanted is None or (wanted == "all" and not self._single) else self.y[:, -1]
        return y if self.layout is None else self.layout.named(y)


def _attach(session: SessionCalls) -> Frame:
    if session._position is not None or session.model is None:
        return text_frame(op="attach", session=session.id)
    states = None if session._states is None else listed(session._states)
    return text_frame(op="open", session=session.id, model=session.model, states=states)
