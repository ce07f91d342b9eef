"""What a process counts beside its engines and sessions: plain numbers, which `metrics.py` reads when it is asked."""

from __future__ import annotations

from collections import Counter

from cellserve.service.engine.stats import SECONDS, Distribution
from cellserve.service.errors import Problem

SURFACES = ("predict", "sessions", "stream", "inference", "operations")

_SLOW_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class SurfaceCounts:
    """What one surface answers."""

    def __init__(self) -> None:
        self.seconds = Distribution(SECONDS)
        self.statuses: Counter[int] = Counter()
        self.problems: Counter[str] = Counter()  # of a binary frame each row's

    def record_response(self, status: int, seconds: float) -> None:
        """Notes an answer with an HTTP status, of a frame the one that HTTP would have."""
        self.statuses[status] += 1
        self.seconds.note(seconds)

    def record_problem(self, problem: Problem) -> None:
        """Notes what was answered instead of a result."""
        self.problems[problem.kind()] += 1


class Counts:
    """What a process counts beside its engines and sessions."""

    def __init__(self) -> None:
        self.surfaces = {name: SurfaceCounts() for name in SURFACES}
        self.sockets = 0  # that are open
        self.snapshots = Distribution(_SLOW_SECONDS)
        self.snapshot_errors = 0

    def surface(self, path: str) -> SurfaceCounts:
        """Gives the counts of the surface that a path belongs to."""
        return self.surfaces[_SURFACE_OF.get(path.split("/", 2)[1] if path[:1] == "/" else "", "operations")]


_SURFACE_OF = {"predict": "predict", "sessions": "sessions", "stream": "stream", "v2": "inference"}
