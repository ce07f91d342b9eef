"""`python -m bench.scale`: writes the table of docs/explanation/scale.md and its plots; or measures, or checks."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from bench.scale import costs, real
from bench.scale.costs import COSTS, Costs
from bench.scale.model import Cluster, simulate
from bench.scale.sizes import table
from cellserve.benchmark.curve import Point
from cellserve.benchmark.svg import draw

CLUSTERS = {  # replicas, shards
    "1, memory": (1, 0),
    "2, 2 shards": (2, 2),
    "16, 12 shards": (16, 12),
    "64, 48 shards": (64, 48),
}
LOADS = 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95
SOURCE = Path(costs.__file__)


def curves(measured: Costs, steps: int) -> dict[str, dict[str, list[Point]]]:
    """Returns the latency of each cluster over its load, by percentile."""
    drawn: dict[str, dict[str, list[Point]]] = {"p50": {}, "p99": {}}
    for name, (replicas, shards) in CLUSTERS.items():
        cluster = Cluster.of(measured, replicas, shards)
        for share in LOADS:
            rate = share * cluster.capacity
            found = simulate(cluster, rate, steps)
            for percentile, seconds in (("p50", found.p50), ("p99", found.p99)):
                drawn[percentile].setdefault(name, []).append(Point(rate, 1e3 * seconds, f"{share:.0%}"))
    return drawn


def put(page: Path, lines: Iterable[str]) -> None:
    """Prints lines, and replaces the table of a page whose first cell is that of their table's by it."""
    shown = []
    for line in lines:
        print(line, flush=True)
        shown.append(line)
    table = [line for line in shown if line.startswith("|")]
    first = re.escape(table[0].split("|")[1])
    page.write_text(re.sub(rf"^\|{first}\|.*?(?=\n\n)", "\n".join(table), page.read_text(), flags=re.M | re.S))


def record(measured: Costs) -> Costs:
    """Prints costs, and writes them into `costs.py`; returns them as they stand there."""
    text = SOURCE.read_text()
    rounded = {name: round(value, 1) for name, value in asdict(measured).items()}
    for name, value in rounded.items():
        print(f"{name}: {value}")
        text = re.sub(rf"^(    {name}: float =) .*$", rf"\g<1> {value}", text, flags=re.M)
    SOURCE.write_text(text)
    return Costs(**rounded)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs/explanation"), help="folder of scale.md and its plots")
    parser.add_argument("--steps", type=int, default=60_000, help="steps that are simulated for each point")
    parser.add_argument("--measure", action="store_true", help="measure the costs on this machine first")
    parser.add_argument("--check", action="store_true", help="compare the model with two real replicas and a Redis")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement (default: 8)")
    arguments = parser.parse_args()
    page = arguments.docs / "scale.md"
    with tempfile.TemporaryDirectory(prefix="cellserve-scale-") as folder:
        if arguments.check:
            put(page, real.check(Path(folder), arguments.seconds))
            return 0
        measured = COSTS
        if arguments.measure:
            measured = record(real.measure(Path(folder), arguments.seconds))
    put(page, table(measured))
    for percentile, drawn in curves(measured, arguments.steps).items():
        title, kind = "Simulated replicas and Redis shards", "share of what they can do"
        plot = draw(drawn, title, kind, f"{percentile} latency, ms")
        (arguments.docs / f"scale-{percentile}.svg").write_text(plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
