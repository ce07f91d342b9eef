"""A run of the benchmark: which servers are started, and what is measured back to back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from websockets.sync.client import connect

from bench import answers, stores, workloads
from bench.network import UNITS
from bench.rounds import Figure, Rounds
from bench.servers import ROOT, SERVER_CORE, Server, Unavailable, redis
from bench.workloads import FRAME

SECTIONS = ("http", "store", "websocket", "predict", "latency", "transfers", "memory", "export", "start")
OURS = ("cellserve", "redis", "process", "disk")  # with sessions in memory, in Redis, in LMDB
OTHERS = ("usual", "usual_keras", "mosec", "triton")
PREDICTORS = ("usual", "mosec", "triton")  # without Keras, which takes many times longer for whole sequences
STARTS = 3
MANY = 100_000  # sessions in the memory measurement
MOSEC = [(batch, wait) for batch in (16, 32) for wait in (0, 1)]  # batch size, milliseconds; the best is used
Run = Callable[[float], Figure]


class Bench:
    """One run.

    Args:
        folder: Folder for models and other files of the run.
        rounds: How often everything is measured.
        seconds: Seconds per measurement.
        report: Called with a description of what is being done.
        stored: Sessions in the store that a server is started with.
    """

    def __init__(
        self, folder: Path, rounds: int, seconds: float, report: Callable[[str], None], stored: int = 1_000_000
    ) -> None:
        self.folder, self.rounds, self.seconds, self.report = folder, rounds, seconds, report
        self.stored = stored
        self.figures = Rounds()
        self.missing: dict[str, str] = {}  # servers that do not start here, and why
        self.mosec: dict[str, tuple[int, int]] = {}  # the best batch size and wait, by route
        self._servers: dict[str, Server] = {}

    def run(self, sections: tuple[str, ...]) -> None:
        """Measures the given sections.

        Raises:
            DifferentAnswers: The servers do not give the same answers.
            LoadFailed: A server gave a bad answer or none.
        """
        self.report("making and exporting the network")
        made = subprocess.run(
            [sys.executable, "-m", "bench.network", str(self.folder)], cwd=ROOT, capture_output=True, text=True
        )
        if made.returncode:
            raise RuntimeError(f"creating the network failed: {made.stderr[-2000:]}")
        if "export" in sections:
            timings = json.loads(made.stdout.splitlines()[-1])["1x50"]
            for name in ("ours", "tf2onnx", "keras"):
                self.figures.add("export", name, Figure(timings[name]))
        if {"start", "memory"} & {*sections}:
            self._starts()
        with ExitStack() as stack:
            groups = self._groups(stack, sections)
            self.report("comparing answers")
            answers.compare(
                self._servers["cellserve"],
                [server for name, server in self._servers.items() if name not in ("cellserve", "floor")],
            )
            for turn in range(self.rounds):
                for group, runs in groups.items():
                    # Every second round in reverse order, so that neither side is always measured second.
                    for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
                        self.report(f"round {turn + 1} of {self.rounds}: {group}, {name}")
                        self.figures.add(group, name, run(self.seconds))
        if "memory" in sections:
            self._memory()
        if "store" in sections:
            self._restarts()

    def _command(self, name: str, *more: str) -> tuple[str, ...]:
        serve = "-m", "cellserve.cli", "serve", "--models", f"{self.folder}/artifacts", "--port", "{port}"
        peer = "-m", f"bench.peers.{name}", "{port}"
        if name in OURS:
            return *serve, "--max-sessions", "200000", *more
        return (*peer, *more) if name == "floor" else (*peer, str(self.folder), *more)

    def _start(self, stack: ExitStack, name: str, *more: str) -> Server:
        self.report(f"starting {name}")
        ready = "/readyz" if name in OURS else {"triton": "/v2/health/ready"}.get(name)
        server = Server(name, *self._command(name, *more), ready=ready)
        stack.callback(server.stop)
        self._servers[name] = server
        return server

    def _groups(self, stack: ExitStack, sections: tuple[str, ...]) -> dict[str, dict[str, Run]]:
        """Starts the servers; returns the groups of runs that are measured back to back."""
        ours = self._start(stack, "cellserve")
        others: list[Server] = []
        if {"http", "predict"} & {*sections}:
            others = self._others(stack)
        floor = self._start(stack, "floor") if {"http", "websocket"} & {*sections} else None
        groups: dict[str, dict[str, Run]] = {}
        self.report("opening sessions")
        if "http" in sections:
            assert floor
            own = workloads.steps(ours)
            for server in (floor, *others):
                groups[f"http {server.name}"] = {"cellserve": own, server.name: workloads.steps(server)}
            url, process = stack.enter_context(redis(self.folder))
            stored = workloads.steps(self._start(stack, "redis", "--store", url), beside=process)
            groups["http redis"] = {"redis": stored, "cellserve": own}
        if "store" in sections:
            own = workloads.steps(ours)
            for name, sync in (("process", "checkpoints"), ("disk", "always")):
                flags = "--store", f"lmdb:{self.folder / name}", "--store-sync", sync
                groups[name] = {name: workloads.steps(self._start(stack, name, *flags)), "cellserve": own}
            groups["disk"]["syncs"] = lambda seconds: stores.syncs(self.folder, seconds)
            for processes in (1, 2):
                groups[f"{processes} without HTTP"] = {
                    store: stores.ticks(self.folder, store, processes) for store in ("lmdb", "memory")
                }
        if "websocket" in sections:
            assert floor
            groups["websocket"] = {"cellserve": workloads.sockets(ours), "floor": workloads.sockets(floor)}
            groups["frames"] = {"cellserve": workloads.binary_frames(ours), "bare": self._bare("steps", FRAME)}
        if "predict" in sections:
            one, sixteen, binary, binary16 = (
                workloads.predictions(ours, count, binary) for binary in (False, True) for count in (1, 16)
            )
            for server in others:
                if server.name not in PREDICTORS:
                    continue
                theirs, theirs16 = (workloads.predictions(server, count) for count in (1, 16))
                groups[f"predict {server.name}"] = {"json": one, "other": theirs, "binary": binary}
                groups[f"predict16 {server.name}"] = {"json": sixteen, "other": theirs16}
            for name, run in {"1 json": one, "16 json": sixteen, "1 binary": binary, "16 binary": binary16}.items():
                steps = sum(request.steps for client in run.clients for request in client.requests)
                requests = sum(len(client.requests) for client in run.clients)
                groups[f"bare {name}"] = {"cellserve": run, "bare": self._bare("sequences", steps / requests)}
        if "latency" in sections:
            few = workloads.steps(ours, sessions=8)
            saturating = workloads.predictions(ours)
            groups["latency"] = {
                "idle": lambda seconds: workloads.latency(few, 3 * seconds),
                "busy": lambda seconds: workloads.latency_under(saturating, few, 3 * seconds),
            }
        if "transfers" in sections:
            groups["transfers"] = {
                name: lambda seconds, run=run: microseconds(run(seconds / 4))  # type: ignore[misc]
                for name, run in workloads.transfers(ours).items()
            }
        return groups

    def _others(self, stack: ExitStack) -> list[Server]:
        found = []
        for name in OTHERS:
            try:
                more = self._best_mosec() if name == "mosec" else ()
                found.append(self._start(stack, name, *more))
            except Unavailable as error:
                self.missing[name] = str(error).splitlines()[-1]
        return found

    def _best_mosec(self) -> tuple[str, ...]:
        """Returns Mosec's flags with the best batch size and wait of each route on this machine."""
        rates: dict[str, dict[tuple[int, int], float]] = {"step": {}, "predict": {}}
        for setting in MOSEC:
            with ExitStack() as stack:
                server = self._start(stack, "mosec", *map(str, setting * 2))
                self.report(f"trying Mosec with batches of {setting[0]} and {setting[1]} ms")
                for route, run in (("step", workloads.steps(server)), ("predict", workloads.predictions(server))):
                    run(0.2)
                    rates[route][setting] = run(min(1.0, self.seconds)).value
            del self._servers["mosec"]
        self.mosec = {route: max(own, key=own.__getitem__) for route, own in rates.items()}
        return tuple(map(str, (*self.mosec["step"], *self.mosec["predict"])))

    def _bare(self, what: str, steps_per_request: float) -> Run:
        """Returns a run of bare ONNX Runtime on the servers' core, with the fastest of our and the peers' models."""
        # A graph for single steps beside our model takes no sequences.
        theirs, ours = {"steps": ("step.onnx", "*.onnx"), "sequences": ("fused.onnx", "model.onnx")}[what]
        models = [self.folder / theirs, *sorted((self.folder / "artifacts/bench/1").glob(ours))]

        def run(seconds: float) -> Figure:
            done = subprocess.run(
                [sys.executable, "-m", "bench.peers.bare", what, str(seconds), *map(str, models)],
                cwd=ROOT, check=True, capture_output=True, text=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
            )  # fmt: skip
            result = json.loads(done.stdout)
            return Figure(result["steps_per_s"], 1e6 * result["cpu_s"] * steps_per_request)

        return run

    def _starts(self) -> None:
        for _ in range(STARTS):
            with ExitStack() as stack:
                server = self._start(stack, "cellserve")
            self.figures.add("start", "cellserve", Figure(server.seconds_to_start))
            self.figures.add("start", "wanted", Figure(2.0))

    def _restarts(self) -> None:
        """Starts a server with many sessions in its store, and with none."""
        self.report(f"making a store with {self.stored:,} sessions")
        many = stores.fill(self.folder, self.stored)
        for _ in range(STARTS):
            for name, store in (("many", many), ("none", f"lmdb:{self.folder / 'none'}")):
                with ExitStack() as stack:
                    server = self._start(stack, "process", "--store", store)
                    resident = server.resident_bytes
                self.figures.add("restart", name, Figure(server.seconds_to_start))
                self.figures.add("restart memory", name, Figure(resident / 2**20))
            self.figures.add("restart", "wanted", Figure(2.0))

    def _memory(self) -> None:
        """Measures the memory of many sessions."""
        with ExitStack() as stack:
            server = self._start(stack, "cellserve")
            self.report(f"opening {MANY:,} sessions")
            before = server.resident_bytes
            with connect(f"ws://127.0.0.1:{server.port}/stream", compression=None) as socket:
                for _ in range(MANY // 100):
                    for _ in range(100):
                        socket.send('{"op":"open"}')
                    for _ in range(100):
                        socket.recv()
            time.sleep(0.5)
            self.figures.add("memory", "cellserve", Figure((server.resident_bytes - before) / MANY))
            self.figures.add("memory", "states", Figure(2 * UNITS * 4))


def microseconds(figure: Figure) -> Figure:
    """Converts the rate of a single client to the time per request."""
    return Figure(1e6 / figure.value, figure.cpu_us, figure.load)
