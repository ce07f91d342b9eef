"""What a stream does, without the doing: sessions are attached to a socket and stepped, and again on the next one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cellserve.calls import Call, Pause
from cellserve.errors import CellserveError, Problem, SessionGone, StepsFailed, UnknownSession
from cellserve.frames import Answered, Exchange, Frame, Stepped, step_frame, text_frame
from cellserve.numbers import Array, float32
from cellserve.retry import ONCE, Retry, Tries, is_passing
from cellserve.session import SessionCalls


class Streaming:
    """Many sessions on one socket.

    Args:
        retry: How a frame without an answer is tried again.
    """

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._own: dict[str, SessionCalls] = {}  # by id: those to be deleted at the end

    def stepped(self, sessions: Sequence[SessionCalls], x: ArrayLike) -> Call[Array]:
        """Steps different sessions of one model at once; what had no answer is sent again from the same positions."""
        x = float32(x)
        single = x.ndim == 2
        x = x[:, None] if single else x
        if x.ndim != 3 or len(x) != len(sessions) or not x.size:
            shape = f"[{len(sessions)}, features] or [{len(sessions)}, time, features]"
            raise ValueError(f"x: its shape is {list(x.shape)}: give {shape} for {len(sessions)} sessions")
        if len({id(session) for session in sessions}) < len(sessions):
            raise ValueError("sessions: one is there twice: give its time steps side by side, or call twice")
        y: Array | None = None
        failures: dict[int, CellserveError] = {}
        rows, tries = list(range(len(sessions))), Tries(self._retry)
        while True:
            try:
                done, refused = yield from self._try([sessions[row] for row in rows], x[rows])
            except CellserveError as error:
                done, refused = None, dict.fromkeys(range(len(rows)), error)
            if done is not None:
                if y is None:
                    y = done.y if len(done.y) == len(sessions) else np.zeros((len(sessions), *done.y.shape[1:]), "f4")
                y[rows] = done.y
            failures |= {rows[row]: error for row, error in refused.items() if not is_passing(error)}
            passing = {rows[row]: error for row, error in refused.items() if is_passing(error)}
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
            raise StepsFailed(failures, np.zeros((*x.shape[:2], 0), np.float32) if y is None else y)
        assert y is not None
        return y[:, 0] if single else y

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

    def _try(self, sessions: list[SessionCalls], x: Array) -> Call[tuple[Stepped | None, dict[int, CellserveError]]]:
        """Sends one frame; gives its answer, zeros where a session has not moved, and why by row."""
        link, missing = yield from self._attached(sessions)
        rows = [row for row in range(len(sessions)) if row not in missing]
        if not rows:
            return None, missing
        here = sessions if not missing else [sessions[row] for row in rows]
        frame = step_frame([one._handle[1] for one in here], [one.position for one in here], x[rows])
        told: Answered = yield Exchange([frame], link)
        (answer,) = told.answers
        if not isinstance(answer, Stepped):
            raise (
                answer if isinstance(answer, CellserveError) else CellserveError(f"not the answer to a step: {answer}")
            )
        for row, (session, position) in enumerate(zip(here, answer.positions, strict=True)):
            if row not in answer.problems:
                session._position = position
        if missing:
            y = np.zeros((len(sessions), *answer.y.shape[1:]), np.float32)
            y[rows] = answer.y
            answer = answer._replace(y=y)
        return answer, missing | {rows[row]: problem for row, problem in answer.problems.items()}

    def _attached(self, sessions: list[SessionCalls]) -> Call[tuple[object, dict[int, CellserveError]]]:
        """Sees to it that sessions have handles on the socket; gives the socket, and why some have none, by row."""
        link = self._link()
        refused: dict[int, CellserveError] = {}
        rows = [row for row, session in enumerate(sessions) if link is None or session._handle[0] is not link]
        if rows:
            told: Answered = yield Exchange([_attach(sessions[row]) for row in rows], link)
            link = told.link
            for row, answer in zip(rows, told.answers, strict=True):
                if isinstance(answer, dict):
                    sessions[row]._attached(link, answer)
                elif isinstance(answer, Problem):
                    refused[row] = answer
        return link, refused


def _attach(session: SessionCalls) -> Frame:
    if session._position is not None or session.model is None:
        return text_frame(op="attach", session=session.id)
    states = session._states and {name: float32(state).tolist() for name, state in session._states.items()}
    return text_frame(op="open", session=session.id, model=session.model, states=states)
