"""The throughput-latency curve as SVG, for light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from cellserve.benchmark.curve import X_TITLE, Y_TITLE, Axis, Point, series, tick
from cellserve.benchmark.measure import Measured

_WIDTH, _HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 72, 60  # around the plot
# The colours of the surfaces on light and on dark pages.
_COLOURS = (("#0b62c4", "#6cb2ff"), ("#c2410c", "#ff9d5c"), ("#15803d", "#5fd38a"), ("#86198f", "#e78bf0"),
            ("#525252", "#b8b8b8"))  # fmt: skip


def in_svg(loads: Sequence[Measured], title: str) -> str:
    """Returns the curve as an SVG document: a line for each surface, a labelled point for each load."""
    kind = "requests per second sent" if loads and loads[0].spec.rate is not None else "sessions"
    return draw(series(loads), title, kind)


def draw(drawn: Mapping[str, Sequence[Point]], title: str, kind: str, y_title: str = Y_TITLE) -> str:
    """Returns an SVG document with a line for each series.

    Args:
        drawn: The points by the name of their series: steps/s and milliseconds.
        title: The title.
        kind: What the label at each point is.
        y_title: What the milliseconds are.
    """
    points = [point for one in drawn.values() for point in one] or [Point(1, 1, "")]
    across, up = Axis.over(point.x for point in points), Axis.over(point.y for point in points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}: {X_TITLE} and {y_title}</title>",
        _style(),
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="title" x="{_LEFT}" y="26">{escape(title)}</text>',
    ]
    parts += _axes(across, up, kind, y_title)
    at = _LEFT
    for number, (name, own) in enumerate(drawn.items()):
        colour = f"s{number % len(_COLOURS)}"
        places = [(_x(across, point), _y(up, point), point.label) for point in own]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<g class="{colour}"><polyline class="line" points="{line}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y, _ in places]
        parts += [
            f'<text class="point" x="{x + 7:.1f}" y="{y - 7:.1f}">{escape(label)}</text>' for x, y, label in places
        ]
        parts.append(
            f'<circle cx="{at + 5}" cy="46" r="4"/><text class="key" x="{at + 15}" y="50">{escape(name)}</text>'
        )
        parts.append("</g>")
        at += 36 + 8 * len(name)
    return "\n".join([*parts, "</svg>", ""])


def _style() -> str:
    light, dark = (
        "".join(f".s{number}{{fill:{both[which]};stroke:{both[which]}}}" for number, both in enumerate(_COLOURS))
        for which in (0, 1)
    )
    return (
        "<style>text{font:13px system-ui,sans-serif;stroke:none}.title{font-size:16px;font-weight:600}"
        ".small,.tick{font-size:12px}.point{font-size:12px}.line{fill:none;stroke-width:2}.key{font-size:13px}"
        f".page{{fill:#fff}}.title,.small,.tick{{fill:#1f2328}}.grid{{stroke:#d8dee4}}.axis{{stroke:#57606a}}{light}"
        "@media (prefers-color-scheme: dark){.page{fill:#0d1117}.title,.small,.tick{fill:#e6edf3}"
        f".grid{{stroke:#30363d}}.axis{{stroke:#9198a1}}{dark}}}</style>"
    )


def _axes(across: Axis, up: Axis, kind: str, y_title: str) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in across.ticks:
        x = _x(across, Point(value, 1, ""))
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick(value)}</text>')
    for value in up.ticks:
        y = _y(up, Point(1, value, ""))
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick(value)}</text>')
    middle = (_LEFT + right) / 2, (_TOP + bottom) / 2
    return [
        *parts,
        f'<path class="axis" fill="none" d="M{_LEFT},{_TOP} V{bottom} H{right}"/>',
        f'<text class="small" x="{middle[0]}" y="{_HEIGHT - 14}" text-anchor="middle">{X_TITLE} (logarithmic); '
        f"at each point: {kind}</text>",
        f'<text class="small" transform="translate(18 {middle[1]}) rotate(-90)" text-anchor="middle">'
        f"{y_title} (logarithmic)</text>",
    ]


def _x(axis: Axis, point: Point) -> float:
    return _LEFT + axis.place(point.x) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, point: Point) -> float:
    return _HEIGHT - _BOTTOM - axis.place(point.y) * (_HEIGHT - _TOP - _BOTTOM)
