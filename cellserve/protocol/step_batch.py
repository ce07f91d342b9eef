"""Sessions that are stepped together over a stream: their inputs, outputs and failures, by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellserve.errors import CellserveError, StepsFailed, UnexpectedAnswer
from cellserve.protocol.frames import Frame, Stepped, step_frame
from cellserve.protocol.session import SessionRecord
from cellserve.signatures import Signature
from cellserve.tensors import FrameLayout, Outputs, TensorLike, Tensors


class StepBatch:
    """One step, or several, of different sessions of one model.

    Args:
        sessions: The sessions, one a row.
        x: Inputs, `[sessions, *features]` or `[sessions, time, *features]`.

    Raises:
        ValueError: There is no session, or one is there twice.
    """

    def __init__(self, sessions: Sequence[SessionRecord], x: TensorLike) -> None:
        if not sessions:
            raise ValueError("sessions: empty: give at least one")
        if len({id(session) for session in sessions}) < len(sessions):
            raise ValueError("sessions: one is there twice: give its time steps side by side, or call twice")
        self.sessions = sessions
        self.failures: dict[int, CellserveError] = {}
        self._given = x
        self._layout: FrameLayout | None = None  # of the outputs, once the model is known
        self._x = self._y = np.zeros((len(sessions), 1, 0), np.float32)  # [sessions, time, ...]
        self._single = False

    @property
    def has_layout(self) -> bool:
        """Whether the model's signature is known."""
        return self._layout is not None

    def lay_out(self, signature: Signature) -> None:
        """Packs the inputs as the model takes them; raises ValueError if they do not fit."""
        self._x, self._single = signature.inputs.pack(self._given, len(self.sessions))
        self._layout = signature.outputs
        self._y = self._layout.zeros(*self._x.shape[:2])

    def frame(self, rows: list[int]) -> Frame:
        """Returns the frame that steps some rows."""
        here = [self.sessions[row] for row in rows]
        return step_frame([one.handle for one in here], [one.position or 0 for one in here], self._x[rows])

    def receive(self, rows: list[int], stepped: Stepped) -> dict[int, CellserveError]:
        """Takes the answer to the frame of these rows and returns the problems by row."""
        shape = len(rows), *self._y.shape[1:]
        try:
            self._y[rows] = np.frombuffer(stepped.y, self._y.dtype.newbyteorder("<")).reshape(shape)
        except ValueError as error:
            raise UnexpectedAnswer(f"y in a frame does not have the shape {list(shape)}: {error}") from None
        for place, row in enumerate(rows):
            if place not in stepped.problems:
                self.sessions[row].position = stepped.positions[place]
        return {rows[place]: problem for place, problem in stepped.problems.items()}

    def raise_failures(self) -> None:
        """Raises the error that all rows share, or StepsFailed if some rows have failed."""
        if not self.failures:
            return
        first = next(iter(self.failures.values()))
        if len(self.failures) == len(self.sessions) and all(error is first for error in self.failures.values()):
            raise first
        raise StepsFailed(self.failures, len(self.sessions), self._unpack(self._y))

    def outputs(self, wanted: Outputs) -> Tensors:
        """Returns y without the time axis if x had none or only the last time step is wanted."""
        return self._unpack(self._y if wanted == "all" and not self._single else self._y[:, -1])

    def _unpack(self, y: Tensors) -> Tensors:
        return y if self._layout is None else self._layout.unpack(y)
