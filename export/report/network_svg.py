"""Draws a network for the report as SVG: layers from top to bottom, states beside the layers that carry them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from cellserve.models.signature import Layer

_WIDTH, _HEIGHT, _STATE, _DOWN, _BESIDE = 176, 44, 118, 34, 26  # box width and height, state width, gaps
_LETTERS = 24  # letters that fit into a box
_END = "end", _HEIGHT / 2
_SHAPES = {"input": _END, "output": _END, "layer": ("box", 6), "recurrent": ("box recurrent", 6)}  # class and radius
_ARROW = (
    '<marker id="{id}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto-start-reverse"><path d="M0 0 8 4 0 8Z" style="fill:var({colour})"/></marker>'
)


@dataclass(slots=True)
class _Box:
    layer: Layer
    rank: int = 0
    left: float = 0.0


def draw_network(layers: Sequence[Layer]) -> str:
    """Returns the drawing as SVG; all names from the network are escaped."""
    boxes = [_Box(layer) for layer in layers]
    ranks: dict[int, list[_Box]] = defaultdict(list)
    for box in boxes:
        box.rank = 1 + max((boxes[source].rank for source in box.layer.sources), default=-1)
        ranks[box.rank].append(box)
    chain = all(len(row) == 1 for row in ranks.values())
    long = any(box.rank - boxes[source].rank > 1 for box in boxes for source in box.layer.sources)
    margin = 46 if long else 4  # for edges that go around boxes
    width = max(_row_width(row, chain) for row in ranks.values()) + 2 * margin
    for row in ranks.values():
        left = margin if chain else (width - _row_width(row, len(row) > 1)) / 2
        if len(row) == 1 and not chain:
            left = (width - _WIDTH) / 2  # boxes stand below each other, with or without states
        for box in row:
            box.left, left = left, left + _room(box) + _BESIDE
    height = len(ranks) * (_HEIGHT + _DOWN) - _DOWN + 8
    parts = [_edge(boxes[source], box, ranks) for box in boxes for source in box.layer.sources]
    parts += [_drawn(box) for box in boxes]
    told = "; ".join(
        f"{layer.name} ({layer.label}{', carries ' + ', '.join(layer.states) if layer.states else ''})"
        for layer in layers
    )
    return (
        f'<div class="wide network"><svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'style="min-width:{0.65 * width:.0f}px" '
        f'aria-labelledby="network-title network-desc"><title id="network-title">The layers and states of the network'
        f'</title><desc id="network-desc">From the inputs to the outputs: {escape(told)}.</desc><defs>'
        f"{_ARROW.format(id='arrow', colour='--dim')}{_ARROW.format(id='state-arrow', colour='--state')}</defs>"
        f"{''.join(parts)}</svg></div>"
    )


def _room(box: _Box) -> float:
    return _WIDTH + (_STATE + _BESIDE if box.layer.states else 0)


def _row_width(row: list[_Box], packed: bool) -> float:
    if len(row) == 1 and not packed:
        return 2 * _room(row[0]) - _WIDTH  # the box in the middle, room for its states on both sides
    return sum(map(_room, row)) + _BESIDE * (len(row) - 1)


def _top(box: _Box) -> float:
    return 4 + box.rank * (_HEIGHT + _DOWN)


def _edge(start: _Box, end: _Box, ranks: dict[int, list[_Box]]) -> str:
    x1, y1 = start.left + _WIDTH / 2, _top(start) + _HEIGHT
    x2, y2 = end.left + _WIDTH / 2, _top(end)
    bend = _DOWN * 0.6
    if end.rank - start.rank > 1:
        # Around the left of what stands between.
        side = min(box.left for rank in range(start.rank + 1, end.rank) for box in ranks[rank]) - 24
        way = f"C{x1} {y1 + bend} {side} {y1} {side} {y1 + bend}L{side} {y2 - bend}"
        way += f"C{side} {y2} {x2} {y2 - bend} {x2} {y2}"
    else:
        way = f"C{x1} {y1 + bend} {x2} {y2 - bend} {x2} {y2}"
    return f'<path class="edge" d="M{x1} {y1}{way}" marker-end="url(#arrow)"/>'


def _drawn(box: _Box) -> str:
    left, top = box.left, _top(box)
    middle = left + _WIDTH / 2
    kind, radius = _SHAPES[box.layer.kind]
    parts = [
        f'<rect class="{kind}" x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" rx="{radius}"/>',
        f'<text x="{middle}" y="{top + 18}" text-anchor="middle">{_fits(box.layer.name)}</text>',
        f'<text class="dim" x="{middle}" y="{top + 34}" text-anchor="middle">{_fits(box.layer.label, 4)}</text>',
    ]
    count = len(box.layer.states)
    for place, state in enumerate(
        box.layer.states[:2] if count < 4 else [*box.layer.states[:1], f"and {count - 1} more states"]
    ):
        rows = min(count, 2)
        each = _HEIGHT / rows
        x, y = left + _WIDTH + _BESIDE, top + place * each
        parts.append(
            f'<path class="feedback" d="M{left + _WIDTH + 2} {y + each / 2}H{x - 2}" marker-start="url(#state-arrow)" '
            f'marker-end="url(#state-arrow)"/><rect class="state" x="{x}" y="{y + 1}" width="{_STATE}" '
            f'height="{each - 2}" rx="5"/><text x="{x + _STATE / 2}" y="{y + each / 2 + 4}" '
            f'text-anchor="middle">{_fits(state, -6)}</text>'
        )
    return "".join(parts)


def _fits(text: str, more: int = 0) -> str:
    most = _LETTERS + more
    return escape(text if len(text) <= most else f"{text[: most - 1]}…")
