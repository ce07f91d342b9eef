"""Frames of a stream, and which future each answer completes."""

from __future__ import annotations

import json
import struct
from concurrent.futures import Future

import numpy as np
import pytest

from cellserve.errors import ConnectionLost, PositionConflict, Problem, UnexpectedAnswer
from cellserve.protocol.frames import Answer, PendingReplies, Stepped, step_frame, text_frame

CONFLICT = {"status": 409, "type": "urn:cellserve:problem:position-conflict", "detail": "it is elsewhere"}


def stepped(ref: int, positions: list[int], statuses: list[int], y: list[float]) -> bytes:
    head = struct.pack("<4I", 0x82, ref, len(positions), 1)
    rows = np.array(positions, "<u8").tobytes() + np.array(statuses, "<u4").tobytes()
    return head + rows + np.array(y, "<f4").tobytes()


@pytest.fixture
def pending() -> PendingReplies[Future[Answer]]:
    return PendingReplies(Future)


def test_a_step_frame_has_a_header_handles_positions_and_inputs() -> None:
    frame = step_frame([7, 8], [3, 4], np.array([[[1.5]], [[2.5]]], np.float32))(9)
    assert isinstance(frame, bytes)
    assert struct.unpack("<4I2I2Q2f", frame) == (2, 9, 2, 1, 7, 8, 3, 4, 1.5, 2.5)


def test_a_text_frame_is_json_with_its_ref() -> None:
    assert json.loads(text_frame(op="attach", session="mine")(5)) == {"op": "attach", "session": "mine", "ref": 5}


def test_answers_complete_the_futures_of_their_refs_in_any_order(pending: PendingReplies[Future[Answer]]) -> None:
    (first, early), (second, late) = pending.expect(), pending.expect()
    pending.receive(json.dumps({"ref": second, "handle": 1}))
    assert not early.done() and late.result() == {"ref": second, "handle": 1}
    pending.receive(json.dumps({"ref": first, "problem": CONFLICT}))
    assert isinstance(early.result(), PositionConflict)


def test_problems_of_rows_arrive_with_the_binary_answer(pending: PendingReplies[Future[Answer]]) -> None:
    ref, future = pending.expect()
    pending.receive(json.dumps({"ref": ref, "row": 1, "problem": CONFLICT}))
    assert not future.done()
    pending.receive(stepped(ref, [5, 4, 0, 6], [0, 409, 503, 1], [1, 0, 0, 2]))
    answer = future.result()
    assert isinstance(answer, Stepped) and answer.positions == [5, 4, 0, 6]
    assert np.frombuffer(answer.y, "<f4").tolist() == [1, 0, 0, 2]
    assert isinstance(answer.problems[1], PositionConflict)
    assert type(answer.problems[2]) is Problem and answer.problems[2].status == 503
    assert set(answer.problems) == {1, 2}


@pytest.mark.parametrize("message", ["text", "[]", "{}", b"", b"\x00" * 16, stepped(0, [1], [0], [])[:20]])
def test_a_message_outside_the_protocol_is_an_unexpected_answer(
    pending: PendingReplies[Future[Answer]], message: str | bytes
) -> None:
    pending.expect()
    with pytest.raises(UnexpectedAnswer):
        pending.receive(message)


def test_an_ended_socket_completes_what_is_pending_and_accepts_nothing_more(
    pending: PendingReplies[Future[Answer]],
) -> None:
    _, future = pending.expect()
    lost = ConnectionLost("lost")
    pending.end(lost)
    pending.end(ConnectionLost("later"))
    assert future.result() is lost
    with pytest.raises(ConnectionLost, match="lost"):
        pending.expect()
