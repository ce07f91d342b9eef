"""`python -m bench`: measures Cellserve and its alternatives in one run, and prints the table."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bench import device, load, table
from bench.answers import DifferentAnswers
from bench.measures import SECTIONS, Bench
from bench.servers import LOAD_CORE, pin

EXAMPLE = """\
examples:
  python -m bench --json bench.json
  python -m bench --rounds 1 --seconds 0.5 --only http,websocket    a first look
  python -m bench --provider cuda --references gpu-references       Cellserve on a GPU
"""


def machine() -> str:
    """Returns the CPU, Python version and date of the run."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    today = datetime.date.today().isoformat()
    return f"{cpu}, one core for the server and one for the load; Python {platform.python_version()}; {today}"


def document(bench: Bench, rows: list[table.Row]) -> dict[str, object]:
    """Returns everything that was measured, as a JSON document."""
    listed = []
    for row in rows:
        comparison = row.comparison
        listed.append(
            {
                "measure": row.measure,
                "beside": row.beside,
                "unit": row.unit,
                "wanted": row.wanted,
                "at_most": row.at_most,
                "met": row.met,
                "ratio": comparison and comparison.ratio,
                "ratios": comparison and comparison.ratios,
                "shown": comparison and [figure.value for figure in comparison.shown],
            }
        )
    figures = {
        group: {name: [asdict(figure) for figure in own] for name, own in names.items()}
        for group, names in bench.figures.figures.items()
    }
    return {
        "machine": machine(),
        "rounds": bench.rounds,
        "seconds": bench.seconds,
        "settings": bench.settings,
        "missing": bench.missing,
        "rows": listed,
        "figures": figures,
    }


def sections(text: str) -> tuple[str, ...]:
    """Parses `--only`."""
    chosen = tuple(text.split(","))
    if unknown := {*chosen} - {*SECTIONS}:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    return chosen


def odd(text: str) -> int:
    """Parses `--rounds`."""
    if not text.isdigit() or int(text) % 2 == 0:
        raise argparse.ArgumentTypeError("must be odd, since the round with the median ratio is shown")
    return int(text)


def missing_requirement() -> str | None:
    """Returns what this machine lacks to run the benchmark, and how to get it; None if nothing."""
    if not sys.platform.startswith("linux"):
        return "it runs on Linux only, since it reads CPU times from /proc"
    for name in ("tensorflow", "mosec", "redis"):
        if find_spec(name) is None:
            return f"{name} is not installed: pip install -e '.[dev]'"
    if shutil.which("redis-server") is None:
        return "redis-server is not installed: apt-get install redis-server"
    return None


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=odd, default=5, help="number of rounds, odd (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per measurement (default: 1)")
    parser.add_argument("--only", type=sections, default=SECTIONS, metavar="SECTIONS",
                        help=f"some of {','.join(SECTIONS)}, separated by commas (default: all)")  # fmt: skip
    parser.add_argument("--stored", type=int, default=1_000_000, metavar="SESSIONS",
                        help="sessions in the store that a server is started with (default: 1,000,000)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to this file")
    device.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.provider:
        return device.main(arguments)
    try:
        if reason := missing_requirement():
            raise RuntimeError(reason)
        load.build()
        pin(LOAD_CORE)
        console = Console(stderr=True)
        with tempfile.TemporaryDirectory(prefix="cellserve-bench-") as folder, Progress(console=console) as progress:
            task = progress.add_task("", total=None)
            bench = Bench(
                Path(folder),
                arguments.rounds,
                arguments.seconds,
                lambda what: progress.update(task, description=what),
                arguments.stored,
            )
            bench.run(arguments.only)
    except (RuntimeError, DifferentAnswers) as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    rows = list(table.rows(bench))
    print("\n".join([table.HEAD, *map(str, rows), "", *table.notes(bench), f"{machine()}."]))
    if arguments.json:
        arguments.json.write_text(json.dumps(document(bench, rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
