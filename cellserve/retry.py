"""How long the client waits for an answer, and when it repeats a request."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from cellserve.errors import CellserveError, ConnectionLost, NeverReached, Problem, RetriesExhausted, StepInFlight

log = logging.getLogger("cellserve.client")

_TRANSIENT = (429, 502, 503, 504)  # RFC 9110; 502 and 504 come from a load balancer


@dataclass(frozen=True, slots=True)
class Timeout:
    """How long one attempt waits for the server.

    Args:
        connect: Seconds to connect.
        answer: Seconds without a byte of an answer.
    """

    connect: float = 2
    answer: float = 30


@dataclass(frozen=True, slots=True)
class Retry:
    """How a request without an answer is repeated: with exponential backoff and full jitter.

    Every request of this client is safe to repeat: one that changes a session carries the session's position.
    Source: Brooker, *Exponential Backoff and Jitter*, AWS Architecture Blog, 2015 ("full jitter").

    Args:
        seconds: No attempt starts later than this after the first one.
        attempts: Most attempts, the first included; None for as many as the time allows.
        first: Longest delay in seconds before the second attempt; it doubles with each further attempt.
        longest: Longest delay in seconds between two attempts, unless the server's `Retry-After` asks for more.
        unreached: In place of `seconds` as long as no connection to the server could ever be made: it may not run, or
            the URL may be wrong.
    """

    seconds: float = 60
    attempts: int | None = None
    first: float = 0.1
    longest: float = 5
    unreached: float = 1


ONCE = Retry(attempts=1)


class Backoff:
    """The failed attempts of one request, and the delays between them.

    Args:
        retry: The limits.
    """

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._began = time.monotonic()
        self.failed = 0

    def delay_after(self, error: CellserveError) -> float:
        """Counts a failed attempt and returns the seconds to wait before the next.

        Raises:
            CellserveError: The error itself, if it is not worth repeating the request.
            RetriesExhausted: No attempt is left.
        """
        if not is_retryable(error):
            raise error
        self.failed += 1
        retry, spent = self._retry, time.monotonic() - self._began
        wait = random.uniform(0, min(retry.longest, retry.first * 2 ** min(self.failed - 1, 30)))
        if isinstance(error, Problem) and error.retry_after is not None:
            wait += error.retry_after  # keeps the jitter, so that clients told the same do not return together
        seconds = min(retry.seconds, retry.unreached) if isinstance(error, NeverReached) else retry.seconds
        if self.failed == retry.attempts or spent + wait > seconds:
            raise RetriesExhausted(self.failed, spent, error)
        level = logging.WARNING if isinstance(error, ConnectionLost) else logging.INFO
        log.log(level, "attempt %d failed: %s; the next follows in %.2f seconds", self.failed, error, wait)
        return wait


def is_retryable(error: CellserveError) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, Problem):
        return error.status in _TRANSIENT or isinstance(error, StepInFlight)
    return isinstance(error, ConnectionLost)


def retry_after(header: str | None) -> float | None:
    """Reads a `Retry-After` header, seconds or a date (RFC 9110, section 10.2.3); None if it is neither."""
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
