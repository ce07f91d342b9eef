"""Counters of a process's surfaces and sockets: plain numbers, read by `prometheus.py` at each scrape."""

from __future__ import annotations

from collections import Counter

from cellserve.service.engine.stats import SECONDS, Histogram
from cellserve.service.errors import Problem

SURFACES = ("predict", "sessions", "stream", "inference", "operations")


class SurfaceCounts:
    """Counters of one surface's answers."""

    def __init__(self) -> None:
        self.seconds = Histogram(SECONDS)
        self.statuses: Counter[int] = Counter()
        self.problems: Counter[str] = Counter()  # by kind; each row of a binary frame counts

    def record_response(self, status: int, seconds: float) -> None:
        """Counts an answer. A frame's status is the one HTTP would have."""
        self.statuses[status] += 1
        self.seconds.observe(seconds)

    def record_problem(self, problem: Problem) -> None:
        """Counts a problem that was answered."""
        self.problems[problem.kind()] += 1


class Counts:
    """Counters of one process. Engines and sessions have their own."""

    def __init__(self) -> None:
        self.surfaces = {name: SurfaceCounts() for name in SURFACES}
        self.sockets = 0  # open WebSockets

    def surface(self, path: str) -> SurfaceCounts:
        """Returns the counters of the surface that serves a path."""
        return self.surfaces[_SURFACE_OF.get(path.split("/", 2)[1] if path[:1] == "/" else "", "operations")]


_SURFACE_OF = {"predict": "predict", "sessions": "sessions", "stream": "stream", "v2": "inference"}
