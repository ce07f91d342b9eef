"""Figures of several rounds, and the comparison that is made of them.

A noisy minute must spoil neither side alone: what is compared is taken back to back within a round, and the ratio is
taken there. Of all rounds the one with the median ratio is shown, whole: so the two figures give the ratio beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.load import BUSY, Load


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement."""

    value: float
    cpu_us: float | None = None  # of the server's processes, microseconds a request
    load: Load | None = None

    @property
    def doubtful(self) -> bool:
        """Whether the generator may be what was measured."""
        return self.load is not None and self.load.busy + self.load.delayed > BUSY


@dataclass(frozen=True, slots=True)
class Comparison:
    """Our figures beside others, a pair a round.

    Args:
        ours: One figure a round.
        theirs: The same.
        inverse: Whether the ratio is theirs over ours: how many times less ours is.
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
    def middle(self) -> int:
        """The round with the median ratio; of an even number the lower one of the two."""
        ratios = self.ratios
        return sorted(range(len(ratios)), key=ratios.__getitem__)[(len(ratios) - 1) // 2]

    @property
    def ratio(self) -> float:
        """The ratio of that round."""
        return self.ratios[self.middle]

    @property
    def shown(self) -> tuple[Figure, Figure]:
        """Both figures of that round."""
        return self.ours[self.middle], self.theirs[self.middle]


class Rounds:
    """All figures, by the group within which they are taken back to back, and by name."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, list[Figure]]] = {}

    def add(self, group: str, name: str, figure: Figure) -> None:
        """Notes one figure."""
        self.figures.setdefault(group, {}).setdefault(name, []).append(figure)

    def __contains__(self, group: str) -> bool:
        return group in self.figures

    def compare(self, group: str, ours: str, theirs: str, inverse: bool = False) -> Comparison:
        """Compares two of a group."""
        return Comparison(self.figures[group][ours], self.figures[group][theirs], inverse)
