"""`python -m bench --provider cuda`: Cellserve on a GPU, beside the CPU, bare ONNX Runtime and PyTorch.

It needs the packages of the service only, and models that were made elsewhere (`make gpu-references`): no TensorFlow,
no C compiler, no network. `--provider cpu` rehearses it.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
from safetensors.numpy import save
from websockets.sync.client import connect

from bench.peers.device import FEATURES, calls_per_s
from bench.servers import ROOT, Server, Unavailable

UNITS, SESSIONS = (128, 1024), (1, 8, 64, 256, 1024)
SEQUENCES, STEPS, CLIENTS = 64, 50, 4  # of a /predict request; requests at a time
MOST_ROWS = max(SESSIONS)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; without a rate, why there is none."""

    units: int
    what: str
    sessions: int
    where: str
    steps_per_s: float | None
    note: str = ""

    def __str__(self) -> str:
        rate = self.note if self.steps_per_s is None else f"{self.steps_per_s:,.0f}"
        return f"| {self.units} | {self.what} | {self.sessions:,} | {self.where} | {rate} |"


HEAD = "| units | measure | sessions | where | time steps/s |\n| --- | --- | --- | --- | --- |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this benchmark takes."""
    group = parser.add_argument_group("on a GPU")
    group.add_argument("--provider", choices=("cuda", "cpu"), help="measure Cellserve on a GPU instead; cpu rehearses")
    group.add_argument("--references", type=Path, default=Path("gpu-references"), help="from `make gpu-references`")
    group.add_argument("--units", type=int, nargs="+", default=UNITS, help="LSTMs to measure")
    group.add_argument("--sessions", type=int, nargs="+", default=SESSIONS, help="sessions stepped at a time")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Measures and prints each row as it comes.

    Raises:
        RuntimeError: A model is missing, or a server does not start.
    """
    models = arguments.references / "artifacts"
    missing = [f"lstm-{units}" for units in arguments.units if not (models / f"lstm-{units}").is_dir()]
    if missing:
        raise RuntimeError(
            f"{models} has no {', '.join(missing)}: make it with `make gpu-references` where TensorFlow is installed, "
            f"carry the folder here, and name it with --references"
        )
    print(HEAD, flush=True)
    rows: list[Row] = []
    with ExitStack() as stack:
        servers = {}
        for where in dict.fromkeys((arguments.provider, "cpu")):
            servers[where] = _server(models, where)
            stack.callback(servers[where].stop)
        for units in arguments.units:
            for row in _measured(arguments, servers, models, units):
                print(row, flush=True)
                rows.append(row)
    return rows


def _server(models: Path, where: str) -> Server:
    threads = str(os.cpu_count() or 1) if where == "cpu" else "1"
    serve = "-m", "cellserve.cli", "serve", "--models", str(models.resolve()), "--port", "{port}"
    more = "--provider", where, "--threads", threads, "--max-batch", str(MOST_ROWS)
    try:
        return Server(f"cellserve on {where}", *serve, *more, ready="/readyz", core=None)
    except Unavailable as error:
        raise RuntimeError(str(error)) from None


def _measured(arguments: argparse.Namespace, servers: dict[str, Server], models: Path, units: int) -> Iterator[Row]:
    name, seconds, provider = f"lstm-{units}", arguments.seconds, arguments.provider
    for count in arguments.sessions:
        for where, server in servers.items():
            yield Row(units, "steps", count, f"Cellserve, {where}", frames_per_s(server, name, count, seconds) * count)
        yield from _bare(models / name / "1" / "model.onnx", units, count, provider, seconds)
    for where, server in servers.items():
        rate = predictions_per_s(server, name, seconds) * SEQUENCES * STEPS
        yield Row(units, f"/predict, {SEQUENCES} sequences of {STEPS}", CLIENTS, f"Cellserve, {where}", rate)


def frame_of(handles: Sequence[int], x: np.ndarray) -> bytes:
    """Returns a binary frame that steps sessions by x `[sessions, time, features]`."""
    return struct.pack("<4I", 1, 0, *x.shape[:2]) + np.array(handles, "<u4").tobytes() + x.astype("<f4").tobytes()


def frames_per_s(server: Server, model: str, count: int, seconds: float) -> float:
    """Steps sessions in binary frames on one WebSocket, two in flight, each of all of its own sessions."""
    rng = np.random.default_rng(0)
    with connect(f"ws://127.0.0.1:{server.port}/stream", compression=None, max_size=None) as socket:
        handles = []
        for _ in range(2 * count):
            socket.send(json.dumps({"op": "open", "model": model}))
            handles.append(json.loads(socket.recv())["handle"])
        frames = []
        for place in range(2):
            own = handles[place * count : (place + 1) * count]
            frames.append(frame_of(own, rng.normal(size=(count, 1, FEATURES))))
        socket.send(frames[0])
        turn = 0

        def one() -> None:
            nonlocal turn
            turn += 1
            socket.send(frames[turn % 2])
            answer = socket.recv()
            if not isinstance(answer, bytes):
                raise RuntimeError(f"a frame was answered {answer}")

        rate = calls_per_s(one, seconds)
        socket.recv()
        return rate


def predictions_per_s(server: Server, model: str, seconds: float) -> float:
    """Sends sequences to /predict as safetensors, for all outputs, from several clients at a time."""
    x = np.random.default_rng(1).normal(size=(SEQUENCES * STEPS, FEATURES)).astype(np.float32)
    body = save({"x": x, "lengths": np.full(SEQUENCES, STEPS, np.int32)})
    url = f"http://127.0.0.1:{server.port}/predict?outputs=all&model={model}"

    def client(_: int) -> float:
        with httpx.Client(timeout=120) as http:
            headers = {"content-type": "application/x-safetensors"}
            return calls_per_s(lambda: http.post(url, content=body, headers=headers).raise_for_status(), seconds)

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(client, range(CLIENTS)))


def _bare(model: Path, units: int, count: int, provider: str, seconds: float) -> Iterator[Row]:
    """Runs what a user would write without a server, in a process of its own: CUDA keeps what it has taken."""
    command = [sys.executable, "-m", "bench.peers.device", str(model.resolve()), str(count), provider, str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"bare ONNX Runtime failed: {done.stderr.strip()[-500:]}")
    for where, result in json.loads(done.stdout.splitlines()[-1]).items():
        rate, note = (None, result) if isinstance(result, str) else (result, "")
        yield Row(units, "steps", count, where, rate, note)


def main(arguments: argparse.Namespace) -> int:
    """Runs the benchmark; returns the command's exit status."""
    try:
        rows = run(arguments)
    except RuntimeError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0
