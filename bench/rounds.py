"""Measurements of several rounds, and their comparison.

Figures that are compared are measured back to back within a round, so that noise on the machine affects both, and each
round has its own ratio. The round with the median ratio is shown, so that the two figures and the ratio agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.load import BUSY, Load


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement."""

    value: float
    cpu_us: float | None = None  # CPU time of the server's processes, microseconds per request
    load: Load | None = None

    @property
    def doubtful(self) -> bool:
        """Whether the load generator may have been the bottleneck."""
        return self.load is not None and self.load.busy + self.load.delayed > BUSY


@dataclass(frozen=True, slots=True)
class Comparison:
    """Our figures and those of another, one pair per round.

    Args:
        ours: Our figure of each round.
        theirs: The other's figure of each round.
        inverse: Whether the ratio is theirs over ours, for figures of which less is better.
    """

    ours: Sequence[Figure]
    theirs: Sequence[Figure]
    inverse: bool = False

    @property
    def ratios(self) -> list[float]:
        """The ratio of each round."""
        pairs = [(ours.value, theirs.value) for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        return [theirs / ours if self.inverse else ours / theirs for ours, theirs in pairs]

    @property
    def median_round(self) -> int:
        """The round with the median ratio; the lower of the two in an even number of rounds."""
        ratios = self.ratios
        return sorted(range(len(ratios)), key=ratios.__getitem__)[(len(ratios) - 1) // 2]

    @property
    def ratio(self) -> float:
        """The median ratio."""
        return self.ratios[self.median_round]

    @property
    def shown(self) -> tuple[Figure, Figure]:
        """Both figures of the round with the median ratio."""
        return self.ours[self.median_round], self.theirs[self.median_round]


class Rounds:
    """All figures, by group, whose figures are measured back to back, and by name."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, list[Figure]]] = {}

    def add(self, group: str, name: str, figure: Figure) -> None:
        """Adds a figure."""
        self.figures.setdefault(group, {}).setdefault(name, []).append(figure)

    def __contains__(self, group: str) -> bool:
        return group in self.figures

    def beyond(self, group: str, ours: str, theirs: str, wanted: float) -> Comparison:
        """Compares the CPU time of ours beyond that of theirs with the time that is wanted, in microseconds."""
        pairs = zip(self.figures[group][ours], self.figures[group][theirs], strict=True)
        more = [Figure((one.cpu_us or 0.0) - (other.cpu_us or 0.0)) for one, other in pairs]
        return Comparison(more, [Figure(wanted)] * len(more))

    def compare(self, group: str, ours: str, theirs: str, inverse: bool = False) -> Comparison:
        """Compares two names of a group."""
        return Comparison(self.figures[group][ours], self.figures[group][theirs], inverse)
