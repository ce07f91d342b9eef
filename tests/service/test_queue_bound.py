"""The bound on waiting time steps: one client fills neither a model's queue nor keeps others out of it."""

from __future__ import annotations

import pytest

from cellserve.service.engine.queue_bound import QueueBound
from cellserve.service.errors import BodyTooLarge, QueueFull


def test_one_request_may_not_fill_the_queue_even_if_nothing_waits() -> None:
    bound = QueueBound("m", 1_000_000, 250_000)
    with pytest.raises(BodyTooLarge):
        bound.enter("a", 250_001)
    assert (bound.waiting, bound.by_client) == (0, {})


def test_a_client_is_refused_for_what_it_has_waiting_and_others_are_not() -> None:
    bound = QueueBound("m", 1_000_000, 250_000)
    assert bound.enter("a", 200_000)
    with pytest.raises(QueueFull):
        bound.enter("a", 60_000)
    assert bound.enter("b", 60_000)
    bound.leave("a", 150_000, True)
    assert bound.enter("a", 60_000)
    for client, steps in (("a", 110_000), ("b", 60_000)):
        bound.leave(client, steps, True)
    assert (bound.waiting, bound.by_client) == (0, {})


def test_a_full_queue_still_takes_what_is_within_a_clients_fair_share() -> None:
    bound = QueueBound("m", 1_000_000, 250_000)
    for client in "abcd":
        bound.enter(client, 250_000)
    assert bound.enter("late", 200_000)
    with pytest.raises(QueueFull):
        bound.enter("late", 1)
    assert bound.enter("later", 1)


def test_steps_are_not_counted_by_client_while_few_wait() -> None:
    bound = QueueBound("m", 1_000_000, 250_000)
    assert not any(bound.enter("a", 1) for _ in range(4096))
    assert bound.enter("a", 1)
    assert (bound.waiting, bound.by_client) == (4097, {"a": 1})
    bound.leave("a", 4096, False)
    bound.leave("a", 1, True)
    assert (bound.waiting, bound.by_client) == (0, {})
