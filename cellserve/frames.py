"""Frames of `WS /stream` and who waits for which answer, without a socket (docs/protocol.md)."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellserve.errors import CellserveError, Problem, UnexpectedAnswer, problem_of
from cellserve.numbers import Array

_HEADER = struct.Struct("<4I")  # kind, ref, sessions, time steps
_STEP_FROM, _STEPPED_FROM = 2, 0x82
_LARGEST_STATUS = 1  # of those that are none of HTTP: 0 applied, 1 applied before
_REFS = 2**32

Frame = Callable[[int], str | bytes]  # writes itself under a ref


class Stepped(NamedTuple):
    """The answer to a binary frame, by row."""

    positions: list[int]
    y: memoryview  # [sessions, time, outputs] as they lie in the frame
    problems: dict[int, Problem]


Answer = dict[str, Any] | Stepped | CellserveError


@dataclass(frozen=True, slots=True)
class Exchange:
    """Frames to be sent at once and answered, on a given socket or on whichever is open: handles are of one socket."""

    frames: Sequence[Frame]
    link: object = None


class Answered(NamedTuple):
    """What came of an Exchange."""

    link: object
    answers: list[Answer]


def text_frame(**document: Any) -> Frame:
    """Makes a JSON frame."""
    return lambda ref: json.dumps({**document, "ref": ref})


def step_frame(handles: Sequence[int], positions: Sequence[int], x: Array) -> Frame:
    """Makes a binary frame of kind 2: sessions step from positions by x `[sessions, time, ...]`, of a frame's types."""
    x = x.astype(x.dtype.newbyteorder("<"), copy=False)
    body = np.array(handles, "<u4").tobytes() + np.array(positions, "<u8").tobytes() + x.tobytes()
    return lambda ref: _HEADER.pack(_STEP_FROM, ref, *x.shape[:2]) + body


class Waiter(Protocol):
    """What both kinds of futures have: asyncio's and those of threads."""

    def done(self) -> bool:
        """Says whether it has a result, or nobody waits any more."""

    def set_result(self, result: Any, /) -> None:
        """Gives it one."""


W = TypeVar("W", bound=Waiter)


class Replies(Generic[W]):
    """Who waits for which answer on one socket.

    Args:
        new: Makes a future.
    """

    def __init__(self, new: Callable[[], W]) -> None:
        self.ended: CellserveError | None = None  # why there will be no more
        self._new = new
        self._next = 0
        self._waiting: dict[int, W] = {}
        self._problems: dict[int, dict[int, Problem]] = {}  # by ref and row, of binary frames to be answered yet
        self._lock = threading.Lock()

    def expect(self) -> tuple[int, W]:
        """Gives a ref for a frame and the future of its answer; raises what has ended the socket."""
        with self._lock:
            if self.ended:
                raise self.ended
            ref, waiter = self._next, self._new()
            self._next = (ref + 1) % _REFS
            self._waiting[ref] = waiter
            return ref, waiter

    def take(self, message: str | bytes) -> None:
        """Hands a message to whoever waits for it; raises UnexpectedAnswer where it is none of the protocol."""
        try:
            if isinstance(message, bytes):
                self._answer(*self._stepped(message))
                return
            document = json.loads(message)
            ref, problem = document["ref"], document.get("problem")
            if "row" in document:
                self._problems.setdefault(ref, {})[document["row"]] = problem_of(problem)
            else:
                self._answer(ref, document if problem is None else problem_of(problem))
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise UnexpectedAnswer(f"a frame that is none of the protocol: {error!r}") from None

    def end(self, error: CellserveError) -> None:
        """Tells all who wait that no answer will come."""
        with self._lock:
            self.ended = self.ended or error
            waiting, self._waiting = self._waiting, {}
        for waiter in waiting.values():
            if not waiter.done():
                waiter.set_result(self.ended)

    def _answer(self, ref: int, answer: Answer) -> None:
        waiter = self._waiting.pop(ref, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(answer)

    def _stepped(self, message: bytes) -> tuple[int, Stepped]:
        kind, ref, count, _ = _HEADER.unpack_from(message)
        if kind != _STEPPED_FROM:
            raise ValueError(f"kind {kind}")
        positions = np.frombuffer(message, "<u8", count, 16).tolist()
        statuses: NDArray[np.uint32] = np.frombuffer(message, "<u4", count, 16 + 8 * count)
        problems = self._problems.pop(ref, {})
        for row in np.flatnonzero(statuses > _LARGEST_STATUS).tolist():
            problems.setdefault(row, Problem(int(statuses[row]), "the session could not be stepped"))
        return ref, Stepped(positions, memoryview(message)[16 + 12 * count :], problems)
