"""Frames of `WS /stream` (docs/reference/protocol.md), and which request each answer belongs to, without a socket."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellserve.errors import CellserveError, Problem, UnexpectedAnswer, problem_of
from cellserve.tensors import Array

_HEADER = struct.Struct("<4I")  # kind, ref, sessions, time steps
_STEP_FROM, _STEPPED_FROM = 2, 0x82
_LARGEST_STATUS = 1  # 0 is "applied", 1 "applied before"; anything larger is an HTTP status
_REFS = 2**32

Frame = Callable[[int], str | bytes]  # returns the frame with a given ref


class Stepped(NamedTuple):
    """The answer to a binary frame, by row."""

    positions: list[int]
    y: memoryview  # [sessions, time, outputs] as laid out in the frame
    problems: dict[int, Problem]


Answer = dict[str, Any] | Stepped | CellserveError


def text_frame(**document: Any) -> Frame:
    """Returns a JSON frame."""
    return lambda ref: json.dumps({**document, "ref": ref})


def step_frame(handles: Sequence[int], positions: Sequence[int], x: Array) -> Frame:
    """Returns a binary frame of kind 2, which steps sessions from given positions by x `[sessions, time, ...]`."""
    x = x.astype(x.dtype.newbyteorder("<"), copy=False)
    body = np.array(handles, "<u4").tobytes() + np.array(positions, "<u8").tobytes() + x.tobytes()
    return lambda ref: _HEADER.pack(_STEP_FROM, ref, *x.shape[:2]) + body


class Future(Protocol):
    """What `asyncio.Future` and `concurrent.futures.Future` have in common here."""

    def done(self) -> bool:
        """Whether it has a result or was cancelled."""

    def set_result(self, result: Any, /) -> None:
        """Sets the result."""


F = TypeVar("F", bound=Future)


class PendingReplies(Generic[F]):
    """The frames of one socket that wait for an answer, by ref.

    Args:
        new_future: Creates a future.
    """

    def __init__(self, new_future: Callable[[], F]) -> None:
        self.ended: CellserveError | None = None  # why no more answers will come
        self._new_future = new_future
        self._next_ref = 0
        self._pending: dict[int, F] = {}
        self._problems: dict[int, dict[int, Problem]] = {}  # by ref and row; they arrive before the binary answer
        self._lock = threading.Lock()

    def expect(self) -> tuple[int, F]:
        """Returns the ref for a new frame and the future of its answer; raises the error that ended the socket."""
        with self._lock:
            if self.ended:
                raise self.ended
            ref, future = self._next_ref, self._new_future()
            self._next_ref = (ref + 1) % _REFS
            self._pending[ref] = future
            return ref, future

    def receive(self, message: str | bytes) -> None:
        """Completes the future that a message answers; raises UnexpectedAnswer if it is not a frame of the protocol."""
        try:
            if isinstance(message, bytes):
                self._complete(*self._read_stepped(message))
                return
            document = json.loads(message)
            ref, problem = document["ref"], document.get("problem")
            if "row" in document:
                self._problems.setdefault(ref, {})[document["row"]] = problem_of(problem)
            else:
                self._complete(ref, document if problem is None else problem_of(problem))
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise UnexpectedAnswer(f"a frame does not follow the protocol: {error!r}") from None

    def end(self, error: CellserveError) -> None:
        """Completes all pending futures with an error; no frame is accepted afterwards."""
        with self._lock:
            self.ended = self.ended or error
            pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_result(self.ended)

    def _complete(self, ref: int, answer: Answer) -> None:
        future = self._pending.pop(ref, None)
        if future is not None and not future.done():
            future.set_result(answer)

    def _read_stepped(self, message: bytes) -> tuple[int, Stepped]:
        kind, ref, count, _ = _HEADER.unpack_from(message)
        if kind != _STEPPED_FROM:
            raise ValueError(f"kind {kind}")
        positions = np.frombuffer(message, "<u8", count, 16).tolist()
        statuses: NDArray[np.uint32] = np.frombuffer(message, "<u4", count, 16 + 8 * count)
        problems = self._problems.pop(ref, {})
        for row in np.flatnonzero(statuses > _LARGEST_STATUS).tolist():
            problems.setdefault(row, Problem(int(statuses[row]), "the session could not be stepped"))
        return ref, Stepped(positions, memoryview(message)[16 + 12 * count :], problems)
