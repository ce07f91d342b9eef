"""The command `cellserve bench`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from cellserve.benchmark import advice, curve, report, svg
from cellserve.benchmark.arguments import parse
from cellserve.benchmark.drive import Leftovers
from cellserve.benchmark.inference_protocol import InferenceProtocol
from cellserve.benchmark.measure import Bench, Measured, Spec
from cellserve.benchmark.own_server import OwnServer
from cellserve.benchmark.progress import Phases
from cellserve.benchmark.server_use import Metrics
from cellserve.benchmark.surfaces import Cellserve
from cellserve.benchmark.target import BenchFailed, Target

_UNBOUNDED = 100_000  # columns


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints the figures; returns the exit status: 0, 1 if it could not measure, 2 for a wrong flag."""
    given = parse(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _interrupt)
    # With `--json -` stdout is for the JSON alone.
    console = Console(file=sys.stderr if given.json == "-" else None, highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=_UNBOUNDED)
    run = Run(given, console)
    try:
        run.measure()
    except BenchFailed as error:
        run.print_table()
        print(f"cellserve bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        run.print_table()
        print("cellserve bench: interrupted", file=sys.stderr)
        return 130
    try:
        run.report()
    except OSError as error:
        print(f"cellserve bench: {error}", file=sys.stderr)
        return 1
    return 0


class Run:
    """One call of the command.

    Args:
        given: Its arguments.
        console: Where the figures go.
    """

    def __init__(self, given: argparse.Namespace, console: Console) -> None:
        self._given, self._console = given, console
        self._loads: list[Measured] = []
        self._advice: list[advice.Advice] = []
        self._about: dict[str, Any] = {}

    def measure(self) -> None:
        """Measures everything; raises BenchFailed."""
        given = self._given
        for file in (given.svg, given.json):
            if file not in (None, "-") and not Path(file).absolute().parent.is_dir():
                raise BenchFailed(f"{file}: there is no such folder")
        with ExitStack() as stack:
            phases = stack.enter_context(Phases(Console(stderr=True, highlight=False)))
            own, url = None, given.url
            if url is None:
                phases.begin(f"starting cellserve serve {' '.join(given.serve)}".rstrip())
                own = stack.enter_context(OwnServer(given.models, given.serve))
                url = own.url
            bench = self._bench(stack, url)
            specs = self._specs(bench)
            phases.expect(len(specs))
            for spec in specs:
                phases.begin(str(spec))
                self._loads.append(bench.measure(spec))
                phases.done()
            self._advise(bench, own, phases)

    def print_table(self) -> None:
        """Prints the figures that there are."""
        if not self._loads:
            return
        self._console.print(report.table(self._loads))
        for note in report.notes(self._loads):
            self._console.print(note, markup=False)

    def report(self) -> None:
        """Prints the figures, the curve and the advice, and writes the files; raises OSError."""
        given, console = self._given, self._console
        about = self._about
        console.print(f"{about['model']} version {about['version']} on {about['server']}", markup=False)
        self.print_table()
        for line in ["", *curve.in_text(self._loads), ""]:
            console.print(line, markup=False, soft_wrap=True)
        for one in self._advice:
            console.print(f"- {one}", markup=False)
        if given.svg:
            title = f"{about['model']} version {about['version']}"
            given.svg.write_text(svg.in_svg(self._loads, title), encoding="utf-8")
        if given.json:
            told = {
                **about,
                "seconds": given.seconds,
                "warm_up": given.warm_up,
                "loads": report.document(self._loads),
                "advice": [{"why": one.why, "what": one.what, "flags": one.flags} for one in self._advice],
            }
            text = json.dumps(told, indent=2) + "\n"
            if given.json == "-":
                print(text, end="")
            else:
                Path(given.json).write_text(text, encoding="utf-8")

    def _bench(self, stack: ExitStack, url: str) -> Bench:
        given = self._given
        target = Target.at(url, given.key)
        model: Cellserve | InferenceProtocol
        if given.protocol == "v2":
            model = InferenceProtocol(target, given.model, given.steps, dict(given.shape))
        else:
            model = Cellserve(target, given.model, given.steps)
        metrics = Metrics(target, given.metrics_url or "/metrics", model.name, model.version)
        leftovers = Leftovers(target)
        stack.callback(self._clean_up, leftovers)
        self._about = self._about or {
            "model": model.name,
            "version": model.version,
            "protocol": given.protocol,
            "server": target.url if given.url else f"cellserve serve {' '.join(given.serve)}".rstrip(),
        }
        return Bench(target, model, metrics, given.seconds, given.warm_up, given.processes, leftovers)

    def _specs(self, bench: Bench) -> list[Spec]:
        given, surfaces = self._given, bench.model.surfaces
        chosen = given.surfaces or bench.model.default_surfaces
        for name in chosen:
            if name not in surfaces:
                raise BenchFailed(f"--surfaces: {name!r} does not fit this model: choose from {', '.join(surfaces)}")
        return [
            Spec(name, sessions, rate)
            for name in chosen
            for sessions in given.sessions
            for rate in given.rate or [None]
        ]

    def _clean_up(self, leftovers: Leftovers) -> None:
        leftovers.delete()
        if leftovers.owed:
            told = f"{len(leftovers.owed)} sessions could not be deleted: they end when they have idled long enough"
            print(f"cellserve bench: {told}", file=sys.stderr)

    def _advise(self, bench: Bench, own: OwnServer | None, phases: Phases) -> None:
        """Says which settings would serve better, and tries them if the server is our own."""
        given = self._given
        found = advice.advise(self._loads, self._facts(bench, own), bench.metrics.missing)
        trials = [] if own is None or given.no_try else [one for one in found if one.flags]
        phases.expect(4 * len(trials))
        for one in found:
            if one not in trials or own is None or one.spec is None:
                self._advice.append(one)
                continue
            try:
                what = self._try(bench, (*own.flags, *one.flags), one.flags, one.spec, phases)
            except BenchFailed as error:
                what = f"{one.what} (trying it failed: {error})"
            self._advice.append(one._replace(what=what))

    def _try(self, bench: Bench, all_flags: Sequence[str], flags: Sequence[str], spec: Spec, phases: Phases) -> str:
        """Measures a load with another server, in turn with the one that there is; returns what came of it."""
        name = " ".join(flags)
        base: list[Measured] = []
        tried: list[Measured] = []
        with ExitStack() as stack:
            phases.begin(f"trying {name}: starting another server")
            other = stack.enter_context(OwnServer(self._given.models, all_flags))
            changed = self._bench(stack, other.url)
            for on, results in ((bench, base), (changed, tried), (changed, tried), (bench, base)):
                phases.begin(f"{'with' if on is changed else 'without'} {name}: {spec}")
                results.append(on.measure(spec))
                phases.done()
        return advice.judge(flags, base, tried)

    def _facts(self, bench: Bench, own: OwnServer | None) -> advice.Facts:
        model, flags = bench.model, () if own is None else own.flags
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        here = bench.target.host in ("127.0.0.1", "::1")
        shared = own is not None and any("://" in one for one in (*flags, os.environ.get("CELLSERVE_STORE", "")))
        return advice.Facts(model.described, model.max_batch, cores if here else None, flags, shared)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
