"""What tests of real processes share: a port to give one, and waiting for what it is to come to."""

from __future__ import annotations

import os
import random
import re
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

Told = TypeVar("Told")

# Below those that the kernel gives to whoever asks for any, so that nobody is given a port while the server that has
# it is being started again. Each worker of pytest-xdist draws from ports of its own.
_WORKER = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0)
_PORTS = range(10_000 + _WORKER % 32, 32_000, 32)
_draw = random.SystemRandom()  # not the generator that a test may have seeded


def free_port() -> int:
    """Gives a port that nobody listens on, for a server that is told its port."""
    while True:
        port = _draw.choice(_PORTS)
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def until(ask: Callable[[], Told], holds: Callable[[Told], object] = bool, seconds: float = 120) -> Told:
    """Asks again and again until what is told holds, and gives that; a server that does not answer tells nothing.

    Args:
        ask: What to ask; an error of HTTP or of the system counts as no.
        holds: Whether this is what is waited for.
        seconds: How long to wait at most: what only a failure takes, however busy the machine is.
    """
    deadline = time.monotonic() + seconds
    while True:
        told: Told | Exception
        try:
            told = ask()
            if holds(told):
                return told
        except (httpx.HTTPError, OSError) as error:
            told = error
        assert time.monotonic() < deadline, f"it never came to that: {told!r}"
        time.sleep(0.05)


def is_busy(client: httpx.Client) -> bool:
    """Whether the server has time steps that it has not answered yet."""
    return bool(re.search(r"^cellserve_queued_steps\{.*\} [1-9]", client.get("/metrics").text, re.M))
