"""Measures one load after the other on one server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from cellserve.benchmark.drive import Figures, Generators, Leftovers
from cellserve.benchmark.plan import Plan
from cellserve.benchmark.server_use import Metrics, ServerUse
from cellserve.benchmark.surfaces import Load
from cellserve.benchmark.target import BenchFailed, Target

KEPT_UP = 0.9  # a server that answers a smaller share of the requests in time does not keep up
BUSY = 0.7  # above this share of its core, used or waited for, the generator may be the limit
UNSTEADY = 0.1  # the halves of a measured time may differ by this share


class Spec(NamedTuple):
    """What load to put on a server."""

    surface: str
    sessions: int
    rate: float | None  # requests per second; None for a closed loop

    def __str__(self) -> str:
        rate = "" if self.rate is None else f", {self.rate:g} requests/s"
        return f"{self.surface}, {self.sessions} session{'s' * (self.sessions > 1)}{rate}"


@dataclass(frozen=True, slots=True)
class Measured:
    """A load, its figures, and what the server did meanwhile (None if it does not tell)."""

    spec: Spec
    figures: Figures
    use: ServerUse | None

    @property
    def generator_is_limit(self) -> bool:
        """Whether the load generator may have been the bottleneck."""
        return self.figures.busy + self.figures.waited > BUSY

    @property
    def overloaded(self) -> bool:
        """Whether an open loop sent more than the server could answer."""
        return self.spec.rate is not None and self.figures.requests_per_s < KEPT_UP * self.spec.rate

    @property
    def unsteady(self) -> bool:
        """Whether throughput differed between the halves of the measured time."""
        return abs(self.figures.drift - 1) > UNSTEADY


class Model(Protocol):
    """A model behind some protocol.

    Attributes:
        name: Its name.
        version: Its version.
        described: The answer to `GET /models/{name}` of Cellserve, or nothing.
        max_batch: Rows of the largest run, if the server tells.
    """

    name: str
    version: str
    described: Mapping[str, Any]
    max_batch: int | None

    @property
    def surfaces(self) -> Mapping[str, Callable[[int, int], Load]]:
        """The loads by name, each a function of the number of sessions and of sockets to share them."""

    @property
    def default_surfaces(self) -> list[str]:
        """The surfaces to measure unless others are asked for."""


@dataclass(frozen=True, slots=True)
class Bench:
    """A server under measurement.

    Attributes:
        target: The server.
        model: The model.
        metrics: Its metrics.
        seconds: How long to measure each load.
        warm_up: Seconds of load before that.
        processes: Load generators.
        leftovers: What must be deleted in the end.
    """

    target: Target
    model: Model
    metrics: Metrics
    seconds: float
    warm_up: float
    processes: int
    leftovers: Leftovers

    def measure(self, spec: Spec) -> Measured:
        """Puts a load on the server and returns what came of it; raises BenchFailed if it could not begin."""
        clients, bodies = self.model.surfaces[spec.surface](spec.sessions, self.processes)
        plan = Plan(self.target, clients, bodies, self.seconds, self.warm_up, spec.rate)
        self.leftovers.add(plan)
        with Generators(plan, self.processes) as generators:
            try:
                generators.wait_until_ready()
                before = self.metrics.scrape()
                figures = generators.run()
                after = self.metrics.scrape()
            except BenchFailed as error:
                raise BenchFailed(f"{spec}: {error}") from None
        self.leftovers.delete()
        return Measured(spec, figures, before.until(after, figures.loaded) if before and after else None)
