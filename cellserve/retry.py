"""For how long an answer is waited for, and how often and for how long a request is tried again."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from cellserve.errors import CellserveError, ConnectionLost, GaveUp, Problem, StepInFlight

_PASSING = (429, 502, 503, 504)  # statuses of what may be better in a moment (RFC 9110; 502 and 504 are a balancer's)


@dataclass(frozen=True, slots=True)
class Timeout:
    """For how long one try waits.

    Args:
        connect: Seconds, for a connection.
        answer: Seconds without a byte of an answer.
    """

    connect: float = 5
    answer: float = 30


@dataclass(frozen=True, slots=True)
class Retry:
    """How a request that had no answer is tried again: with exponential backoff and full jitter.

    Every request of this client may be repeated without fear: what changes a session carries its position.
    The source of the backoff: Brooker, *Exponential Backoff and Jitter*, AWS Architecture Blog, 2015 ("full jitter").

    Args:
        seconds: After so many since the first try none more is begun.
        attempts: Tries, at most; None for as many as the time allows.
        first: Seconds, at most, before the second try; twice as many before the third, and so on.
        longest: Seconds between two tries, at most, unless the server's `Retry-After` asks for more.
    """

    seconds: float = 60
    attempts: int | None = None
    first: float = 0.1
    longest: float = 5


ONCE = Retry(attempts=1)


class Tries:
    """The tries of one call.

    Args:
        retry: How many there may be.
    """

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._began = time.monotonic()
        self.failed = 0

    def pause(self, error: CellserveError) -> float:
        """Notes that a try has failed; gives the seconds to wait before the next.

        Raises:
            CellserveError: The error itself, where another try would end the same way.
            GaveUp: There may be none more.
        """
        if not is_passing(error):
            raise error
        self.failed += 1
        retry, spent = self._retry, time.monotonic() - self._began
        wait = random.uniform(0, min(retry.longest, retry.first * 2 ** min(self.failed - 1, 30)))
        if isinstance(error, Problem) and error.retry_after is not None:
            wait += error.retry_after  # jitter on top, lest all who were told the same come back together
        if self.failed == retry.attempts or spent + wait > retry.seconds:
            raise GaveUp(self.failed, spent, error)
        return wait


def is_passing(error: CellserveError) -> bool:
    """Says whether the same request may fare better in a moment."""
    if isinstance(error, Problem):
        return error.status in _PASSING or isinstance(error, StepInFlight)
    return isinstance(error, ConnectionLost)


def retry_after(header: str | None) -> float | None:
    """Reads a `Retry-After` header, seconds or a date (RFC 9110, section 10.2.3); None where it is neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (moment - datetime.now(UTC)).total_seconds()) if moment.tzinfo else None
