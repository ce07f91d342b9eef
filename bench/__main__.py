"""`python -m bench`: measures Cellserve beside what else there is, all in one run, and prints the table."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bench import measures
from bench.servers import LOAD_CORE, ROOT, Server, pin, redis, running

EXAMPLE = """\
example:
  python -m bench --json bench.json
  python -m bench --rounds 1 --seconds 0.5    a first look, within a minute
"""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    measure: str
    figure: str  # what was measured, for its own sake: it says little on another machine
    beside: str  # what it is compared with
    ratio: float
    wanted: float | None  # nothing where it is only told
    at_most: bool = False  # whether the ratio is to stay below

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        if self.wanted is None:
            return True
        return self.ratio <= self.wanted if self.at_most else self.ratio >= self.wanted


class Rounds:
    """Figures of all rounds; ratios are taken within a round, so that a noisy minute spoils neither side alone."""

    def __init__(self) -> None:
        self.figures: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.figures[name])

    def ratio(self, one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(self.figures[one], self.figures[other], strict=True))


def measure(folder: Path, rounds: int, seconds: float, step: Callable[[str], None]) -> tuple[list[Row], Rounds]:
    """Runs everything; gives the table and the figures behind it."""
    step("exporting the network")
    made = subprocess.run(
        [sys.executable, "-m", "bench.network", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    if made.returncode:
        raise RuntimeError(made.stderr[-2000:])
    timings = json.loads(made.stdout.splitlines()[-1])["1x50"]
    model = folder / "artifacts/bench/1/model.onnx"
    pin(LOAD_CORE)
    figures = Rounds()
    cellserve = ("cellserve", "-m", "cellserve.cli", "serve", "--models", str(folder / "artifacts"), "--port", "{port}",
                 "--max-sessions", "200000")  # fmt: skip
    step("starting")
    for _ in range(3):
        server = Server(*cellserve)
        figures.add("start", server.seconds_to_start)
        server.stop()
    peers = [
        ("floor", "-m", "bench.peers.floor", "{port}"),
        ("usual", "-m", "bench.peers.usual", "{port}", str(model)),
        ("usual_keras", "-m", "bench.peers.usual_keras", "{port}", str(folder / "bench.keras")),
        ("mosec", "-m", "bench.peers.mosec_server", "{port}", str(model)),
    ]
    with redis(folder) as url, running(cellserve, ("redis", *cellserve[1:], "--store", url), *peers) as servers:
        _rates(servers, model, figures, rounds, seconds, step)
        for _ in range(rounds):
            step("a step's latency")
            idle = measures.step_latency(servers["cellserve"], 2 * seconds)
            busy = measures.step_latency_under_load(servers["cellserve"], 3 * seconds)
            figures.add("p99 idle", idle)
            figures.add("p99 busy", busy)
            for name, value in measures.transfers(servers["cellserve"], seconds / 4).items():
                figures.add(name, value)
    step("100,000 sessions")
    snapshot = "--snapshot", str(folder / "sessions"), "--snapshot-seconds", "3600"
    with running((*cellserve, *snapshot)) as servers:
        figures.add("memory", measures.session_bytes(servers["cellserve"], 100_000))
    server = Server(*cellserve, *snapshot)
    figures.add("restore", server.seconds_to_start)
    server.stop()
    for name in ("tf2onnx", "ours", "keras"):
        figures.add(f"export {name}", timings[name])
    return _table(figures), figures


def _rates(
    servers: dict[str, Server], model: Path, figures: Rounds, rounds: int, seconds: float, step: Callable[[str], None]
) -> None:
    runs: dict[str, Callable[[float], float]] = {}
    step("opening sessions")
    for name, server in servers.items():  # the one over Redis among them
        runs[f"steps {name}"] = measures.Steps(server).run
    for name in ("cellserve", "floor"):
        runs[f"ws {name}"] = measures.Sockets(servers[name]).run
    runs["frames cellserve"] = measures.BinaryFrames(servers["cellserve"]).run
    for name in ("cellserve", "usual", "usual_keras", "mosec"):
        runs[f"predict {name}"] = measures.Predictions(servers[name]).run
    runs["predict16 cellserve"] = measures.Predictions(servers["cellserve"], 16).run
    runs["binary cellserve"] = measures.Predictions(servers["cellserve"], 1, binary=True).run
    runs["binary16 cellserve"] = measures.Predictions(servers["cellserve"], 16, binary=True).run
    for _ in range(rounds):
        for name, run in runs.items():
            step(name)
            figures.add(name, run(seconds))
        step("bare ONNX Runtime")
        for name, value in measures.bare(model, seconds).items():
            figures.add(f"bare {name}", value)
    best = [
        max(rates)
        for rates in zip(
            *(figures.figures[f"predict {name}"] for name in ("usual", "usual_keras", "mosec")), strict=True
        )
    ]
    figures.figures["predict others"] = best


def _table(figures: Rounds) -> list[Row]:
    def rate(name: str, unit: str = "steps/s") -> str:
        return f"{figures.median(name):,.0f} {unit}"

    def row(measure: str, one: str, beside: str, other: str, wanted: float) -> Row:
        return Row(measure, rate(one), f"{beside}: {rate(other)}", figures.ratio(one, other), wanted)

    http, ws = "HTTP JSON, 64 sessions", "WebSocket JSON, 64 sockets"
    frames = "one WebSocket, binary frames of 256 sessions"
    predict = "`/predict`, 32 clients"
    ms = {name: 1000 * figures.median(name) for name in ("p99 idle", "p99 busy")}
    export = {name: figures.median(f"export {name}") for name in ("ours", "tf2onnx", "keras")}
    us = f"{export['ours']:.0f} µs"
    return [
        row(http, "steps cellserve", "FastAPI + pydantic + ONNX Runtime", "steps usual", 5),
        row(http, "steps cellserve", "the same with Keras", "steps usual_keras", 5),
        row(http, "steps cellserve", "Mosec", "steps mosec", 1.2),
        row(http, "steps cellserve", "the floor: uvicorn, empty endpoint", "steps floor", 0.75),
        row(f"{http}, sessions in Redis", "steps redis", "sessions in memory", "steps cellserve", 0.5),
        row(ws, "ws cellserve", "echo on the same server", "ws floor", 0.6),
        row(frames, "frames cellserve", "bare ONNX Runtime, batch 256", "bare steps", 0.7),
        row(f"{predict}, JSON", "predict cellserve", "the best other", "predict others", 3),
        row(f"{predict}, JSON", "predict cellserve", "bare ONNX Runtime, best batch", "bare sequences", 0.5),
        row(f"{predict}, 16 sequences a request, JSON", "predict16 cellserve", "the same", "bare sequences", 0.5),
        row(f"{predict}, binary", "binary cellserve", "the same", "bare sequences", 0.8),
        row(f"{predict}, 16 sequences a request, binary", "binary16 cellserve", "the same", "bare sequences", 0.8),
        Row("a step's p99 while `/predict` saturates the server", f"{ms['p99 busy']:.2f} ms",
            f"idle: {ms['p99 idle']:.2f} ms", figures.ratio("p99 busy", "p99 idle"), 3, at_most=True),
        Row("memory of 100,000 sessions", f"{figures.median('memory') * 1024:,.0f} bytes a session",
            "its states: 1,024 bytes", figures.median("memory"), 2, at_most=True),
        *(
            Row(what, f"{1e6 * figures.median(name):.0f} µs", f"a step: {1e6 * figures.median('alone step'):.0f} µs",
                figures.ratio(name, "alone step"), None)
            for what, name in (("fork of a session", "alone fork"), ("download of a state", "alone read"),
                               ("upload of a state", "alone write"))
        ),
        Row("restore of 100,000 sessions from a snapshot", f"{figures.median('restore'):.2f} s to ready",
            f"without: {figures.median('start'):.2f} s", figures.median("restore") / figures.median("start"), None),
        Row("the export, batch 1, 50 time steps", us, f"tf2onnx's `Loop`: {export['tf2onnx']:.0f} µs",
            export["tf2onnx"] / export["ours"], 3),
        Row("the export, batch 1, 50 time steps", us, f"Keras: {export['keras']:.0f} µs",
            export["keras"] / export["ours"], 20),
        Row("start of `cellserve serve` to ready", f"{figures.median('start'):.2f} s", "2 s",
            figures.median("start") / 2, 1, at_most=True),
    ]  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """Writes the table."""
    lines = ["| measure | Cellserve | beside | ratio | goal | |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        goal = "" if row.wanted is None else f"{'≤' if row.at_most else '≥'} {row.wanted:g}"
        met = "" if row.wanted is None else "✓" if row.met else "✗"
        lines.append(f"| {row.measure} | {row.figure} | {row.beside} | {row.ratio:.2f} | {goal} | {met} |")
    return "\n".join(lines)


def machine() -> str:
    """Says what was measured on, and when."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    today = datetime.date.today().isoformat()
    return f"{cpu}, one core for the server and one for the load; Python {platform.python_version()}; {today}"


def main() -> int:
    """Runs the command; gives its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for how long at a time (default: 1)")
    parser.add_argument("--json", type=Path, help="a file to write all figures to")
    arguments = parser.parse_args()
    missing = [name for name in ("tensorflow", "mosec", "redis") if find_spec(name) is None]
    if missing:
        print(f"python -m bench: {missing[0]} is not installed: pip install -e '.[bench]'", file=sys.stderr)
        return 2
    if shutil.which("redis-server") is None:
        print("python -m bench: redis-server is not installed: apt-get install redis-server", file=sys.stderr)
        return 2
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="cellserve-bench-") as folder, Progress(console=console) as progress:
        task = progress.add_task("", total=None)
        rows, figures = measure(
            Path(folder), arguments.rounds, arguments.seconds, lambda what: progress.update(task, description=what)
        )
    print(f"{markdown(rows)}\n\nMedians of {arguments.rounds} rounds; {machine()}.")
    if arguments.json:
        document = {"machine": machine(), "rows": [asdict(row) for row in rows], "figures": figures.figures}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
