"""What a generator has to do, and what it reports when it is done. Both travel between processes."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cellserve.benchmark.target import Target


class Body(NamedTuple):
    """The part of a request that differs from one to the next, with the time steps in it."""

    data: bytes
    steps: int


@dataclass(frozen=True, slots=True)
class Client:
    """One connection with one request in flight at a time.

    It sends the leads once, one after the other; then, for as long as the load lasts, `prefix + body + suffix` with the
    plan's bodies in turn.

    Attributes:
        leads: Requests that open what it uses: sessions, a WebSocket.
        prefix: What stands before each body.
        suffix: What stands after it.
        ends: HTTP requests that delete what the leads made.
    """

    leads: tuple[bytes, ...] = ()
    prefix: bytes = b""
    suffix: bytes = b""
    ends: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """A load on a server.

    Attributes:
        target: The server.
        clients: The connections.
        bodies: What they send in a cycle, each beginning at another place.
        seconds: How long to measure.
        warm_up: Seconds of load before that.
        rate: Requests per second of all clients together, for an open loop; None for a closed loop, where a client
            sends its next request when it has its answer.
    """

    target: Target
    clients: Sequence[Client]
    bodies: Sequence[Body]
    seconds: float
    warm_up: float
    rate: float | None = None

    def share(self, place: int, count: int) -> Plan:
        """Returns the part of one of several generators."""
        clients = self.clients[place::count]
        rate = None if self.rate is None else self.rate * len(clients) / len(self.clients)
        return Plan(self.target, clients, self.bodies, self.seconds, self.warm_up, rate)


@dataclass(slots=True)
class Tally:
    """What a generator has counted in the measured time.

    Attributes:
        latencies: Seconds of each request without an error, from when it was sent, or in an open loop was due. One that
            was never answered counts with how long it has waited.
        requests: Requests that were answered, with an error or without.
        steps: Time steps that were answered.
        halves: The same, in the first and in the second half of the time.
        errors: Requests that failed, by HTTP status or what else happened.
        samples: The first message of each kind of error.
        seconds: The measured time.
        loaded: Seconds from the first request to the last answer.
        busy: The generator's share of its core.
        waited: The share of the time in which it was ready to run, but others used its core.
    """

    latencies: array[float] = field(default_factory=lambda: array("d"))
    requests: int = 0
    steps: float = 0
    halves: tuple[float, float] = (0, 0)
    errors: Counter[str] = field(default_factory=Counter)
    samples: dict[str, str] = field(default_factory=dict)
    seconds: float = 0
    loaded: float = 0
    busy: float = 0
    waited: float = 0


class Ready(NamedTuple):
    """All leads are answered; the generator waits to be told to go."""


class Failed(NamedTuple):
    """The load could not begin."""

    why: str
