"""Idempotency keys: what a change with a position does, and what a repetition of it is answered."""

from __future__ import annotations

import asyncio
import hashlib
import threading

import numpy as np
import pytest

from cellserve.service.errors import PositionConflict, SessionWentBack
from cellserve.service.idempotency import (
    AppliedChange,
    IdempotencyKey,
    creation_digest,
    hashed,
    resolve,
    rollout_key,
    state_key,
    states_digest,
    step_key,
)

X = np.arange(6, dtype=np.float32).reshape(3, 2)
KEY = step_key(4, X, True)
LAST = AppliedChange(KEY, 7)  # a session at 4 has taken three time steps


@pytest.mark.parametrize("last", [None, LAST])
def test_a_change_at_the_session_s_position_is_applied(last: AppliedChange | None) -> None:
    assert resolve(7, last, step_key(7, X, True)) is None


def test_a_repetition_of_the_last_change_is_answered_again() -> None:
    assert resolve(7, LAST, step_key(4, X.copy(), True)) is LAST


def test_another_change_at_the_last_change_s_position_is_a_conflict() -> None:
    with pytest.raises(PositionConflict) as conflict:
        resolve(7, LAST, step_key(4, X + 1, True))
    assert conflict.value.extensions == {"position": 7}
    assert "continue from 7" in conflict.value.detail


def test_a_repetition_after_a_change_without_a_position_is_a_conflict() -> None:
    with pytest.raises(PositionConflict):
        resolve(8, LAST, KEY)  # one more step has been taken since


def test_a_change_from_an_earlier_position_is_a_conflict() -> None:
    with pytest.raises(PositionConflict):
        resolve(7, LAST, step_key(2, X, True))
    with pytest.raises(PositionConflict):
        resolve(7, None, KEY)


def test_a_change_from_a_later_position_says_that_the_session_went_back() -> None:
    with pytest.raises(SessionWentBack) as back:
        resolve(3, LAST, KEY)
    assert back.value.extensions == {"position": 3}
    assert "steps from 3" in back.value.detail


def test_a_repetition_is_recognised_only_if_the_session_is_where_the_change_left_it() -> None:
    with pytest.raises(SessionWentBack):
        resolve(3, AppliedChange(KEY, 7), KEY)
    assert resolve(7, AppliedChange(KEY, 7), KEY) is not None


def test_equal_steps_have_equal_keys_whatever_their_memory_layout() -> None:
    assert step_key(4, np.asfortranarray(X), True) == KEY
    assert step_key(4, np.repeat(X, 2, axis=0)[::2], True) == KEY


def test_keys_differ_by_position_values_length_outputs_and_operation() -> None:
    keys = [
        KEY,
        step_key(5, X, True),
        step_key(4, X + 1, True),
        step_key(4, X[:2], True),
        step_key(4, X, False),
        rollout_key(4, X, b"3 1"),
        rollout_key(4, X, b"3 2"),
        state_key(4, None),
        state_key(4, {"h": X}),
        state_key(4, {"c": X}),
        state_key(4, {"h": X + 1}),
    ]
    assert len({(key.position, key.digest) for key in keys}) == len(keys)


def test_one_time_step_has_the_same_key_whether_all_outputs_or_the_last_are_returned() -> None:
    assert step_key(4, X[:1], True) == step_key(4, X[:1], False)


def test_the_order_of_states_does_not_matter() -> None:
    assert states_digest({"h": X, "c": X + 1}) == states_digest({"c": X + 1, "h": X})
    assert states_digest(None) == b""


def test_creations_differ_by_model_and_by_states() -> None:
    digests = [creation_digest("a", None), creation_digest("b", None), creation_digest("a", {"h": X})]
    assert len(set(digests)) == 3
    assert creation_digest("a", None) == digests[0]


def test_a_key_has_the_position_that_it_was_made_for() -> None:
    assert isinstance(KEY, IdempotencyKey)
    assert (KEY.position, len(KEY.digest)) == (4, 32)


def test_keys_are_those_that_stores_already_hold() -> None:
    assert step_key(4, X, True).digest == hashlib.sha256(b"step 4 %d 1 " % len(X) + X.tobytes()).digest()
    assert rollout_key(4, X, b"3 1").digest == hashlib.sha256(b"rollout 4 3 1 " + X.tobytes()).digest()
    assert state_key(4, None).digest == hashlib.sha256(b"state 4 ").digest()


def test_large_tensors_are_hashed_beside_the_event_loop() -> None:
    small, large = np.zeros(1000, np.float32), np.zeros(1_000_000, np.float32)

    async def main() -> None:
        here = threading.get_ident()
        assert await hashed(None, threading.get_ident) == await hashed(small, threading.get_ident) == here
        assert await hashed(large, threading.get_ident) != here
        assert await hashed({"h": small, "c": large}, threading.get_ident) != here

    asyncio.run(main())
