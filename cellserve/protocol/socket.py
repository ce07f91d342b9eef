"""Options and errors of the WebSocket, which both forms of the client share."""

from __future__ import annotations

from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import CloseCode

from cellserve.errors import AnswerTooLarge, CellserveError, ConnectionLost, UnexpectedAnswer, problem_of_body
from cellserve.protocol.frames import Answer
from cellserve.retry import Timeout, retry_after

OPTIONS: dict[str, Any] = {
    "compression": None,  # float32 hardly shrinks
    "max_queue": None,  # a caller that sends many frames before it reads would block itself
    "close_timeout": 1,  # seconds for the server to close its end
}


def stream_url(url: str) -> str:
    """Returns the WebSocket URL of a server."""
    return "ws" + url.removeprefix("http") + "/stream"


def not_opened(error: Exception, url: str) -> CellserveError:
    """Returns what to raise when a socket could not be opened."""
    if isinstance(error, InvalidStatus):
        response = error.response
        wait = retry_after(response.headers.get("retry-after"))
        return problem_of_body(response.status_code, bytes(response.body or b""), wait)
    return ConnectionLost(f"{url}: {str(error) or type(error).__name__}")


def was_lost(error: Exception, max_answer_bytes: int) -> CellserveError:
    """Returns what to raise when an open socket broke."""
    if isinstance(error, ConnectionClosed) and error.sent and error.sent.code == CloseCode.MESSAGE_TOO_BIG:
        return AnswerTooLarge(max_answer_bytes)
    return ConnectionLost(f"the socket was lost: {error}")


def no_answer(timeout: Timeout) -> ConnectionLost:
    """Returns what to raise when an answer did not come in time."""
    return ConnectionLost(f"no answer within {timeout.answer:g} seconds")


def raise_if_ended(answers: list[Answer]) -> list[Answer]:
    """Returns the answers, or raises the error that ended the socket before they all came."""
    for answer in answers:
        if isinstance(answer, ConnectionLost | UnexpectedAnswer):
            raise answer
    return answers
