"""The throughput-latency curve: its points and logarithmic axes, and its drawing in plain characters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cellserve.benchmark.measure import Measured

X_TITLE, Y_TITLE = "steps/s", "p99 latency, ms"


class Point(NamedTuple):
    """One load: its throughput, its latency, and how it is labelled."""

    x: float
    y: float
    label: str


@dataclass(frozen=True, slots=True)
class Axis:
    """A logarithmic axis from `low` to `high`, with ticks at 1, 2 and 5 times powers of ten."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Iterable[float]) -> Axis:
        """Returns an axis that has room for all values, ending at ticks."""
        values = list(values)
        low, high = min(values), max(values)
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        first = max(step for step in steps if step <= low * 0.999)
        last = min(step for step in steps if step >= high * 1.001)
        inside = tuple(step for step in steps if first <= step <= last)
        if len(inside) > 8:  # decades are enough
            inside = tuple(step for step in inside if math.log10(step) % 1 < 1e-9 or math.log10(step) % 1 > 1 - 1e-9)
        return cls(first, last, inside)

    def place(self, value: float) -> float:
        """Returns where a value is: 0 at the low end, 1 at the high end."""
        return math.log(value / self.low) / math.log(self.high / self.low)


def series(loads: Sequence[Measured]) -> dict[str, list[Point]]:
    """Returns the points of each surface, in the order of their load."""
    found: dict[str, list[Point]] = {}
    for load in loads:
        x, y = load.figures.steps_per_s, load.figures.p99_ms
        if x > 0 and y > 0:  # nan is not
            label = str(load.spec.sessions) if load.spec.rate is None else f"{load.spec.rate:g}/s"
            found.setdefault(load.spec.surface, []).append(Point(x, y, label))
    return found


def tick(value: float) -> str:
    """Returns a tick's label."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def in_text(loads: Sequence[Measured], width: int = 64, height: int = 16) -> list[str]:
    """Returns the curve as lines of plain characters: a letter for each surface, with the sessions or the rate."""
    drawn = series(loads)
    points = [point for one in drawn.values() for point in one]
    if not points:
        return []
    across, up = Axis.over(point.x for point in points), Axis.over(point.y for point in points)
    margin = max(len(tick(value)) for value in up.ticks) + 2
    rows = [[" "] * width for _ in range(height)]
    letters = _letters(list(drawn))
    for name, own in drawn.items():
        for point in own:
            column = round(across.place(point.x) * (width - 1))
            row = height - 1 - round(up.place(point.y) * (height - 1))
            text = letters[name] + point.label
            if column + len(text) > width:  # beside its left
                text, column = point.label + letters[name], max(0, column - len(text) + 1)
            while "".join(rows[row][column : column + len(text) + 1]).strip() and row > 0:
                row -= 1  # above what is there already
            for place, character in enumerate(text[: width - column], column):
                rows[row][place] = character
    at = {height - 1 - round(up.place(value) * (height - 1)): tick(value) for value in up.ticks}
    lines = [f"{Y_TITLE} (logarithmic)"]
    lines += [f"{at.get(number, ''):>{margin - 1}} |{''.join(row).rstrip()}" for number, row in enumerate(rows)]
    ruler, numbers = ["-"] * width, [" "] * (width + 8)
    for value in across.ticks:
        column, text = round(across.place(value) * (width - 1)), tick(value)
        ruler[column] = "+"
        begin = max(0, column - len(text) // 2)
        if not "".join(numbers[max(0, begin - 1) : begin + len(text) + 1]).strip():
            numbers[begin : begin + len(text)] = text
    lines += [" " * margin + "+" + "".join(ruler), " " * (margin + 1) + "".join(numbers).rstrip()]
    lines += [f"{X_TITLE + ' (logarithmic)':>{margin + 1 + width}}"]
    kind = "rate" if loads[0].spec.rate is not None else "sessions"
    lines += [f"{', '.join(f'{letter} {name}' for name, letter in letters.items())}; the number: {kind}"]
    return lines


def _letters(names: Sequence[str]) -> dict[str, str]:
    """Returns a letter for each surface, its first one if that is free."""
    taken: dict[str, str] = {}
    for name in names:
        taken[name] = next(letter for letter in f"{name}abcdefgh" if letter.isalpha() and letter not in taken.values())
    return taken
