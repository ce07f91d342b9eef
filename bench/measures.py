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
from bench.export_times import LARGE
from bench.network import UNITS
from bench.rounds import Figure, Rounds
from bench.servers import ROOT, SERVER_CORE, Server, Unavailable, redis
from bench.workloads import FRAME, SESSIONS

SECTIONS = ("http", "store", "websocket", "large", "predict", "latency", "transfers", "memory", "export", "start")
OURS = ("cellserve", "redis", "process", "disk", "large")  # sessions in memory, in Redis, in LMDB; of a large model
OTHERS = ("usual", "usual_keras", "mosec", "triton")
PREDICTORS = ("usual", "mosec", "triton")  # without Keras, which takes many times longer for whole sequences
STARTS = 3
MANY = 100_000  # sessions in the memory measurement
# Batch sizes and waits in milliseconds that are tried of servers with such settings; the best are used.
TRIED = {"mosec": [(batch, wait) for batch in (16, 32) for wait in (0, 1)], "triton": [(16, 0), (64, 0), (64, 1)]}
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
        self.settings: dict[str, dict[str, tuple[int, int]]] = {}  # the best batch size and wait, by server and route
        self.best: dict[str, str] = {}  # the other server that predicts fastest, by group
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
            for name in ("ours", "tf2onnx"):
                self.figures.add("export", name, Figure(timings[name]))
        if {"export", "large"} & {*sections}:
            self._export_times()
        if {"start", "memory"} & {*sections}:
            self._starts()
        with ExitStack() as stack:
            groups = self._groups(stack, sections)
            self.report("comparing answers")
            answers.compare(
                self._servers["cellserve"],
                [server for name, server in self._servers.items() if name not in ("cellserve", "floor", "large")],
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

    def _export_times(self) -> None:
        """Measures the export of networks of several sizes; makes the large model."""
        self.report("measuring the export of larger networks")
        command = [sys.executable, "-m", "bench.export_times", str(self.folder), str(self.rounds)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=to_server_core)
        if done.returncode:
            raise RuntimeError(f"measuring the export failed: {done.stderr[-2000:]}")
        for size, makers in json.loads(done.stdout.splitlines()[-1]).items():
            for name, times in makers.items():
                for microseconds in times:
                    self.figures.add(f"export {size}", name, Figure(microseconds))

    def _command(self, name: str, *more: str) -> tuple[str, ...]:
        models = self.folder / ("large" if name == "large" else "artifacts")
        serve = "-m", "cellserve.cli", "serve", "--models", str(models), "--port", "{port}"
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
        if "large" in sections:
            large = self._start(stack, "large")
            answers.compare_with_operators(large, self.folder / f"operator-{LARGE}-1.onnx")
            groups["large"] = {
                "cellserve": workloads.binary_frames(large, SESSIONS),
                "bare": self._bare("large", SESSIONS),
            }
        if "predict" in sections:
            for group, count in (("predict", 1), ("predict16", 16)):
                json_run, binary_run = (workloads.predictions(ours, count, binary) for binary in (False, True))
                steps = sum(request.steps for client in json_run.clients for request in client.requests)
                requests = sum(len(client.requests) for client in json_run.clients)
                bare = self._bare("sequences", steps / requests)
                groups[group] = {"json": json_run, "binary": binary_run, "bare": bare}
                if best := self._fastest(group, count, others):
                    groups[group] = {"other": best, **groups[group]}
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
                more = self._best_settings(name) if name in TRIED else ()
                found.append(self._start(stack, name, *more))
            except Unavailable as error:
                self.missing[name] = str(error).splitlines()[-1]
        return found

    def _best_settings(self, name: str) -> tuple[str, ...]:
        """Returns a server's flags with the best batch size and wait of each route on this machine."""
        rates: dict[str, dict[tuple[int, int], float]] = {"step": {}, "predict": {}}
        for setting in TRIED[name]:
            with ExitStack() as stack:
                server = self._start(stack, name, *map(str, setting * 2))
                self.report(f"trying {name} with batches of {setting[0]} and {setting[1]} ms")
                for route, run in (("step", workloads.steps(server)), ("predict", workloads.predictions(server))):
                    run(0.2)
                    rates[route][setting] = run(min(0.7, self.seconds)).value
            del self._servers[name]
        self.settings[name] = {route: max(own, key=own.__getitem__) for route, own in rates.items()}
        return tuple(map(str, (*self.settings[name]["step"], *self.settings[name]["predict"])))

    def _fastest(self, group: str, sequences: int, others: list[Server]) -> Run | None:
        """Returns the run of the other server that predicts fastest: only that one is measured in every round."""
        runs = {one.name: workloads.predictions(one, sequences) for one in others if one.name in PREDICTORS}
        if not runs:
            return None
        rates = dict.fromkeys(runs, 0.0)
        for _ in range(2):
            for name, run in runs.items():
                self.report(f"trying {name}: {sequences} sequences a request")
                rates[name] = max(rates[name], run(min(0.5, self.seconds)).value)
        self.best[group] = max(rates, key=rates.__getitem__)
        return runs[self.best[group]]

    def _bare(self, what: str, steps_per_request: float) -> Run:
        """Returns a run of bare ONNX Runtime on the servers' core, with the fastest of our and the peers' models."""
        # A graph for single steps beside our model takes no sequences.
        theirs, ours = {
            "steps": ("step.onnx", "artifacts/bench/1/*.onnx"),
            "sequences": ("fused.onnx", "artifacts/bench/1/model.onnx"),
            "large": (f"operator-{LARGE}-1.onnx", "large/large/1/model.onnx"),
        }[what]
        models = [self.folder / theirs, *sorted(self.folder.glob(ours))]

        def run(seconds: float) -> Figure:
            done = subprocess.run(
                [sys.executable, "-m", "bench.peers.bare", what, str(seconds), *map(str, models)],
                cwd=ROOT, check=True, capture_output=True, text=True,
                preexec_fn=to_server_core,
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


def to_server_core() -> None:
    """Pins a process that is about to start to the servers' core."""
    os.sched_setaffinity(0, {SERVER_CORE})


def microseconds(figure: Figure) -> Figure:
    """Converts the rate of a single client to the time per request."""
    return Figure(1e6 / figure.value, figure.cpu_us, figure.load)
