"""What all tests share: where things are, free ports, and waiting with a deadline."""

from __future__ import annotations

import os
import random
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
FEATURES, OUTPUTS = 5, 3  # of the small networks in tests/networks.py

# Below the range from which the kernel assigns ports, so that nobody takes a port while its server restarts.
# Each worker of pytest-xdist draws from ports of its own.
_WORKER = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0)
_PORTS = range(10_000 + _WORKER % 32, 32_000, 32)
_draw = random.SystemRandom()  # not the generator that a test may have seeded


def free_port() -> int:
    """Returns a port that nobody listens on, for a server that has to be given one."""
    while True:
        port = _draw.choice(_PORTS)
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def until(ask: Callable[[], T], holds: Callable[[T], object] = bool, seconds: float = 120, pause: float = 0.05) -> T:
    """Asks again and again until the answer holds, and returns it; a server that does not answer is asked again.

    Args:
        ask: What to ask; an error of HTTP or of the system counts as no.
        holds: Whether an answer is the one waited for.
        seconds: The deadline. Only a failure takes this long, however busy the machine is.
        pause: Seconds between two questions.
    """
    deadline = time.monotonic() + seconds
    while True:
        answer: T | Exception
        try:
            answer = ask()
            if holds(answer):
                return answer
        except (httpx.HTTPError, OSError) as error:
            answer = error
        assert time.monotonic() < deadline, f"not within {seconds} seconds; the last answer: {answer!r}"
        time.sleep(pause)
