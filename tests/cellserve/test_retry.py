"""Which requests are repeated, and after what delay."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from cellserve.errors import ConnectionLost, NeverReached, Problem, RetriesExhausted, problem_of
from cellserve.retry import Backoff, Retry, retry_after


def problem(status: int, name: str = "", wait: float | None = None) -> Problem:
    return problem_of({"status": status, "type": f"urn:cellserve:problem:{name}", "detail": "so it is"}, wait)


def test_delays_are_random_and_grow_up_to_the_longest() -> None:
    retry = Retry(seconds=1e9, first=1, longest=16)
    for failed in range(10):
        pauses = []
        for _ in range(50):
            backoff = Backoff(retry)
            backoff.failed = failed
            pauses.append(backoff.delay_after(ConnectionLost("lost")))
        bound = min(16, 2**failed)
        assert 0 <= min(pauses) < max(pauses) <= bound
        assert max(pauses) > bound / 2


def test_a_retry_waits_at_least_the_servers_retry_after() -> None:
    for _ in range(20):
        assert 7 <= Backoff(Retry(first=1)).delay_after(problem(503, "server-full", 7)) <= 8


def test_a_retry_after_beyond_the_time_limit_raises_at_once() -> None:
    with pytest.raises(RetriesExhausted) as exhausted:
        Backoff(Retry(seconds=10)).delay_after(problem(503, "model-version-not-here", 60))
    assert isinstance(exhausted.value.__cause__, Problem)


def test_a_server_that_was_never_reached_is_given_up_long_before_one_that_was() -> None:
    for error, is_given_up in ((NeverReached("nobody there"), True), (ConnectionLost("lost"), False)):
        backoff = Backoff(Retry())
        backoff.delay_after(error)
        backoff._began -= 1.1  # seconds ago
        if is_given_up:
            with pytest.raises(RetriesExhausted, match="after 2 attempts in 1"):
                backoff.delay_after(error)
        else:
            backoff.delay_after(error)


def test_failed_attempts_are_logged_as_warnings_if_there_was_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "cellserve.client"):
        backoff = Backoff(Retry())
        backoff.delay_after(ConnectionLost("http://a: refused"))
        backoff.delay_after(problem(503, "server-full", 7))
    first, second = caplog.records
    assert (first.levelname, second.levelname) == ("WARNING", "INFO")
    assert first.getMessage().startswith("attempt 1 failed: http://a: refused; the next follows in 0.")
    assert second.getMessage().startswith("attempt 2 failed: 503")


def test_attempts_are_counted_and_limited() -> None:
    backoff = Backoff(Retry(attempts=3, first=0))
    for _ in range(2):
        backoff.delay_after(ConnectionLost("lost"))
    with pytest.raises(RetriesExhausted, match="after 3 attempts") as exhausted:
        backoff.delay_after(ConnectionLost("lost"))
    assert exhausted.value.attempts == 3


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionLost("lost"), True),
        (problem(502), True),
        (problem(503, "store-away"), True),
        (problem(503, "version-loading"), True),
        (problem(504), True),
        (problem(429), True),
        (problem(409, "step-in-flight"), True),
        (problem(409, "position-conflict"), False),
        (problem(500), False),
        (problem(422, "invalid-input"), False),
        (problem(401, "unauthorized"), False),
        (problem(410, "session-gone"), False),
    ],
)
def test_only_transient_errors_are_retried(error: Problem, again: bool) -> None:
    if again:
        Backoff(Retry()).delay_after(error)
    else:
        with pytest.raises(type(error)) as raised:
            Backoff(Retry()).delay_after(error)
        assert raised.value is error


def test_retry_after_is_seconds_or_a_date() -> None:
    assert [retry_after(header) for header in (None, "3", "soon", "-1")] == [None, 3, None, 0]
    wait = retry_after(formatdate(time.time() + 100, usegmt=True))
    assert wait is not None and 90 < wait <= 100
