"""What was measured, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from cellserve.benchmark.measure import BUSY, UNSTEADY, Measured


def table(loads: Sequence[Measured]) -> Table:
    """Returns a row for each load."""
    open_loop = any(load.spec.rate is not None for load in loads)
    with_use = any(load.use for load in loads)
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("surface")
    for heading in ("sessions", *(["requests/s sent"] if open_loop else []), "steps/s", "p50 ms", "p95 ms", "p99 ms"):
        shown.add_column(heading, justify="right")
    shown.add_column("errors", overflow="fold")
    for heading in ("generator", *(["server", "batch"] if with_use else [])):
        shown.add_column(heading, justify="right")
    for load in loads:
        spec, figures, use = load.spec, load.figures, load.use
        marks = "*" * load.generator_is_limit
        row = [spec.surface, str(spec.sessions)]
        row += [] if not open_loop else [f"{spec.rate:g}"]
        row += [f"{figures.steps_per_s:,.0f}{'~' * load.unsteady}"]
        row += [_ms(value) for value in (figures.p50_ms, figures.p95_ms, figures.p99_ms)]
        row += [", ".join(f"{kind}: {count:,}" for kind, count in figures.errors.items()) or "none"]
        row += [f"{figures.busy:.0%}{marks}"]
        if with_use:
            row += [f"{use.cores:.0%}" if use and use.cores is not None else "", f"{use.rows:.1f}" if use else ""]
        shown.add_row(*map(escape, row))
    return shown


def notes(loads: Sequence[Measured]) -> Iterator[str]:
    """Yields what a reader of the table must know."""
    if any(load.generator_is_limit for load in loads):
        yield (
            f"* the load generator used its core, or waited for it, for more than {BUSY:.0%} of the time: it may have "
            "been the limit. Use --processes 2, or run it on another machine."
        )
    if any(load.unsteady for load in loads):
        yield (
            f"~ the halves of the measured time differ by more than {UNSTEADY:.0%}: measure longer (--seconds), or on "
            "a machine with less else to do."
        )
    for load in loads:
        if load.overloaded:
            rate = f"{load.figures.requests_per_s:,.0f} requests/s were answered"
            yield f"{load.spec}: only {rate}: what waits grows, and latencies with it, for as long as this lasts."
    seen = set()
    for load in loads:
        for kind, sample in load.figures.samples.items():
            if kind in load.figures.errors and (load.spec.surface, kind) not in seen:
                seen.add((load.spec.surface, kind))
                yield f"{load.spec}: the first error: {sample}"


def document(loads: Sequence[Measured]) -> list[dict[str, Any]]:
    """Returns the loads for JSON."""
    return [
        {
            **load.spec._asdict(),
            **{name: _finite(value) for name, value in asdict(load.figures).items()},
            "generator_is_limit": load.generator_is_limit,
            "unsteady": load.unsteady,
            "overloaded": load.overloaded,
            "server": None if load.use is None else asdict(load.use),
        }
        for load in loads
    ]


def _ms(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
