"""The table: which figures are compared, their goals, and how a row is written."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from bench.export_times import LARGE
from bench.export_times import SIZES as EXPORTED
from bench.load import BUSY
from bench.measures import Bench
from bench.network import UNITS
from bench.rounds import Comparison, Figure
from bench.workloads import CLIENTS, SESSIONS

NAMES = {
    "floor": "the floor: uvicorn, empty endpoint",
    "mosec": "Mosec",
    "triton": "Triton, Python backend",
    "usual": "FastAPI + pydantic + ONNX Runtime",
    "usual_keras": "the same with Keras",
}
HEAD = """\
| measure | Cellserve | beside | ratio (all rounds) | CPU µs a request: ours / theirs | goal | |
| --- | --- | --- | --- | --- | --- | --- |"""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table."""

    measure: str
    beside: str
    comparison: Comparison | None = None  # None if the other is not available here
    unit: str = "steps/s"
    wanted: float | None = None  # goal of the ratio; None if there is none
    at_most: bool = False  # whether the goal is an upper bound
    digits: int = 0  # decimals of the figures

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None if there is none."""
        if self.wanted is None or self.comparison is None:
            return None
        ratio = self.comparison.ratio
        return ratio <= self.wanted if self.at_most else ratio >= self.wanted

    def __str__(self) -> str:
        goal = "" if self.wanted is None else f"{'≤' if self.at_most else '≥'} {self.wanted:g}"
        met = {None: "", True: "✓", False: "✗"}[self.met]
        if self.comparison is None:
            return f"| {self.measure} | | {self.beside} | | | {goal} | |"
        ours, theirs = self.comparison.shown
        ratios = self.comparison.ratios
        spread = f" ({ratio(min(ratios))} to {ratio(max(ratios))})" if len(ratios) > 1 else ""
        cpu = "" if ours.cpu_us is None or theirs.cpu_us is None else f"{short(ours.cpu_us)} / {short(theirs.cpu_us)}"
        cells = [self.measure, self._figure(ours), f"{self.beside}: {self._figure(theirs)}",
                 f"{ratio(self.comparison.ratio)}{spread}", cpu, goal, met]  # fmt: skip
        return f"| {' | '.join(cells)} |"

    def _figure(self, figure: Figure) -> str:
        return f"{figure.value:,.{self.digits}f}{'*' if figure.doubtful else ''} {self.unit}"


def ratio(value: float) -> str:
    """Formats a ratio."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def short(value: float) -> str:
    """Formats microseconds."""
    return f"{value:,.1f}" if value < 10 else f"{value:,.0f}"


def rows(bench: Bench) -> Iterator[Row]:
    """Yields a row for everything that was measured."""
    figures = bench.figures
    http, predict = f"HTTP JSON, {SESSIONS} sessions", f"`/predict`, {CLIENTS} clients"
    one, sixteen = f"{predict}, a sequence a request", f"{predict}, 16 sequences a request"
    for name, goal in (("floor", 0.8), ("mosec", 1.7), ("triton", None), ("usual", 5), ("usual_keras", 5)):
        if f"http {name}" in figures:
            yield Row(http, NAMES[name], figures.compare(f"http {name}", "cellserve", name), wanted=goal)
        elif name in bench.missing:
            yield Row(http, f"{NAMES[name]}: not available here: {bench.missing[name]}")
    if "http redis" in figures:
        in_redis = figures.compare("http redis", "redis", "cellserve")
        yield Row(f"{http}, sessions in Redis", "sessions in memory", in_redis, wanted=0.5)
        beyond = figures.beyond("http redis", "redis", "cellserve", 45)
        yield Row(f"{http}, sessions in Redis: CPU beyond sessions in memory", "wanted", beyond, "µs a step", 1,
                  at_most=True, digits=1)  # fmt: skip
    if "process" in figures:
        yield Row(f"{http}, `--store lmdb:`, outlives the process", "sessions in memory",
                  figures.compare("process", "process", "cellserve"), wanted=0.85)  # fmt: skip
        rate = statistics.median(figure.value for figure in figures.figures["disk"]["syncs"])
        yield Row(f"{http}, the same with `--store-sync always`, outlives a power cut",
                  f"sessions in memory (this disk syncs {rate:,.0f} times a second)",
                  figures.compare("disk", "disk", "cellserve"), wanted=0.4)  # fmt: skip
        yield Row("a tick of 256 sessions of 1 KB without HTTP: CPU beyond sessions in memory", "wanted",
                  figures.beyond("1 without HTTP", "lmdb", "memory", 8), "µs a step", 1, at_most=True,
                  digits=1)  # fmt: skip
        yield Row("two workers over one store, without HTTP", "two servers in memory",
                  figures.compare("2 without HTTP", "lmdb", "memory"), wanted=0.9)  # fmt: skip
    if "restart" in figures:
        many = f"{bench.stored:,} sessions of 1 KB in its store"
        yield Row(f"start to ready with {many}", "wanted", figures.compare("restart", "many", "wanted"),
                  "s", 1, at_most=True, digits=3)  # fmt: skip
        yield Row(f"memory of a server with {many}", "with none", figures.compare("restart memory", "many", "none"),
                  "MiB", 1.1, at_most=True)  # fmt: skip
    if "websocket" in figures:
        echo = figures.compare("websocket", "cellserve", "floor")
        yield Row(f"WebSocket JSON, {SESSIONS} sockets", "echo on uvicorn", echo, wanted=0.85)
        bare = figures.compare("frames", "cellserve", "bare")
        yield Row("one WebSocket, binary frames of 256 sessions", "bare ONNX Runtime, batch 256", bare, wanted=0.75)
    if "large" in figures:
        yield Row(f"one WebSocket, binary frames of {SESSIONS} sessions, LSTM of {LARGE:,} units",
                  f"bare ONNX Runtime, batch {SESSIONS}", figures.compare("large", "cellserve", "bare"),
                  wanted=0.9)  # fmt: skip
    for group, measure, name, goal in (("predict", f"{one}, JSON", "json", 1.6),
                                       ("predict", f"{one}, safetensors", "binary", 1.9),
                                       ("predict16", f"{sixteen}, JSON", "json", 2.0)):  # fmt: skip
        if best := bench.best.get(group):
            beside = f"the best other's JSON, {NAMES[best]}" if name == "binary" else f"the best other, {NAMES[best]}"
            yield Row(measure, beside, figures.compare(group, name, "other"), wanted=goal)
    for group, measure in (("predict", one), ("predict16", sixteen)):
        for name, kind in (("json", "JSON"), ("binary", "safetensors")):
            if group in figures:
                compared = figures.compare(group, name, "bare")
                yield Row(f"{measure}, {kind}", "bare ONNX Runtime, best batch", compared)
    if "latency" in figures:
        yield Row("a step's p99 while `/predict` saturates the server", "idle",
                  figures.compare("latency", "busy", "idle"), "ms", 2.5, at_most=True, digits=3)  # fmt: skip
    if "memory" in figures:
        yield Row("memory of 100,000 sessions", "their states", figures.compare("memory", "cellserve", "states"),
                  "bytes a session", 2, at_most=True)  # fmt: skip
    if "transfers" in figures:
        for measure, name in (("fork of a session", "fork"), ("download of a state", "download"),
                              ("upload of a state", "upload")):  # fmt: skip
            yield Row(measure, "a step, one client", figures.compare("transfers", name, "step"), "µs", digits=1)
    if "export" in figures:
        exported = "the export, batch 1, 50 time steps"
        yield Row(exported, "tf2onnx's `Loop`", figures.compare("export", "ours", "tf2onnx", inverse=True), "µs", 3,
                  digits=1)  # fmt: skip
        for units, layers in EXPORTED:
            measure = f"{exported}, {units:,} units{', two layers' if layers == 2 else ''}"
            for name, beside, goal in (("operator", "ONNX Runtime's `LSTM` operator", 0.95),
                                       ("keras", "Keras", 18 if units == UNITS else 1)):  # fmt: skip
                compared = figures.compare(f"export {units}x{layers}", "ours", name, inverse=True)
                yield Row(measure, beside, compared, "µs", goal)
    if "start" in figures:
        yield Row("start of `cellserve serve` to ready", "wanted", figures.compare("start", "cellserve", "wanted"),
                  "s", 1, at_most=True, digits=3)  # fmt: skip


def notes(bench: Bench) -> Iterator[str]:
    """Yields the notes that explain the table."""
    every = [figure for group in bench.figures.figures.values() for own in group.values() for figure in own]
    loads = [figure.load for figure in every if figure.load]
    yield (
        f"Each ratio is the median of the rounds' ratios; there were {bench.rounds} rounds. The two figures beside it "
        "are from that round, in which both sides were measured one after the other. Brackets: the lowest and the "
        "highest ratio of all rounds. A ratio without brackets was measured once."
    )
    if loads:
        busy, delayed = [load.busy for load in loads], [load.delayed for load in loads]
        yield (
            f"The load generator used {min(busy):.0%} to {max(busy):.0%} of its core. Up to {max(delayed):.0%} of the "
            "time it waited for that core, which others had. `*` marks a figure where use and wait add up to more "
            f"than {BUSY:.0%}: the generator may have been the limit."
        )
    for name, why in bench.missing.items():
        yield f"{NAMES[name]} is not available here, so it is not among the others: {why}."
    for name, routes in bench.settings.items():
        settings = ", ".join(f"`/{route}` {batch} and {wait} ms" for route, (batch, wait) in routes.items())
        yield f"{NAMES[name]}, at the best of the batch sizes and waits tried: {settings}."
