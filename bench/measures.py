"""The measures: each gives figures of one round; `bench.__main__` repeats them and takes medians and ratios."""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from bench.load import Connection, drive, frame, request
from bench.servers import LOAD_CORE, ROOT, SERVER_CORE, Server, pin

FEATURES, UNITS = 16, 128
SESSIONS, CLIENTS, FRAME = 64, 32, 256
CONTENT = "application/x-safetensors"

rng = np.random.default_rng(0)


def numbers(*shape: int) -> list:
    """Draws numbers as a client would send them: float32, written short."""
    return np.round(rng.normal(size=shape), 4).tolist()


def lengths(count: int) -> list[int]:
    """Draws lengths of sequences: log-normal, median 30, from 7 to 200."""
    return np.clip(np.exp(rng.normal(np.log(30), 0.7, count)), 7, 200).astype(int).tolist()


class Steps:
    """64 clients, a session each, one JSON step after the other over HTTP."""

    def __init__(self, server: Server) -> None:
        self.port, self.requests = server.port, []
        connection = Connection(server.port)
        for _ in range(SESSIONS):
            if server.name == "mosec":
                session = connection.ask_json("/step", {})["session"]
                bodies = [json.dumps({"session": session, "x": numbers(FEATURES)}).encode() for _ in range(8)]
                path = "/step"
            else:
                session = "0" * 32
                if server.name != "floor":
                    session = connection.ask_json("/sessions", {})["session"]
                bodies = [json.dumps({"x": numbers(FEATURES)}).encode() for _ in range(8)]
                path = f"/sessions/{session}/step"
            self.requests.append([request(path, body) for body in bodies])

    def run(self, seconds: float) -> float:
        """Gives steps a second."""
        return drive([Connection(self.port) for _ in self.requests], self.requests, seconds).rate


class Sockets:
    """64 WebSockets, a session each, one JSON step after the other; beside it a server that echoes the same frames."""

    def __init__(self, server: Server) -> None:
        self.server = server
        bodies = [json.dumps({"op": "step", "session": 0, "x": numbers(FEATURES)}).encode() for _ in range(8)]
        self.requests = [[frame(body, 1) for body in bodies]] * SESSIONS

    def run(self, seconds: float) -> float:
        """Gives steps a second."""
        connections = [Connection(self.server.port) for _ in range(SESSIONS)]
        for connection in connections:
            connection.upgrade("/stream")
            if self.server.name != "floor":
                connection.ask(frame(b'{"op":"open"}', 1))
        return drive(connections, self.requests, seconds).rate


class BinaryFrames:
    """One WebSocket, two frames under way on it, each of 256 sessions of its own."""

    def __init__(self, server: Server) -> None:
        self.port = server.port
        self.requests = []
        for place in range(8):
            handles = np.arange(FRAME, dtype="<u4") + FRAME * (place % 2)
            x = rng.normal(size=(FRAME, 1, FEATURES)).astype("<f4")
            self.requests.append(frame(struct.pack("<4I", 1, place, FRAME, 1) + handles.tobytes() + x.tobytes(), 2))

    def run(self, seconds: float) -> float:
        """Gives steps a second."""
        connection = Connection(self.port)
        connection.upgrade("/stream")
        for _ in range(2 * FRAME):
            connection.ask(frame(b'{"op":"open"}', 1))
        return FRAME * drive([connection], [self.requests], seconds, deep=2).rate


class Predictions:
    """32 clients that send sequences of 7 to 200 time steps, so many in a request, in JSON or in safetensors."""

    def __init__(self, server: Server, sequences: int = 1, binary: bool = False) -> None:
        self.port = server.port
        self.requests, steps, count = [], 0, 0
        for _ in range(CLIENTS):
            own = []
            for _ in range(max(2, 16 // sequences)):
                times = lengths(sequences)
                steps, count = steps + sum(times), count + 1
                if binary:
                    x = rng.normal(size=(sum(times), FEATURES)).astype(np.float32)
                    body = save({"x": x, "lengths": np.array(times, np.int32)})
                    own.append(request("/predict?outputs=last", body, CONTENT))
                else:
                    body = json.dumps({"sequences": [numbers(time, FEATURES) for time in times]}).encode()
                    own.append(request("/predict", body))
            self.requests.append(own)
        self.steps_a_request = steps / count

    def run(self, seconds: float) -> float:
        """Gives time steps a second."""
        connections = [Connection(self.port) for _ in self.requests]
        return self.steps_a_request * drive(connections, self.requests, seconds).rate


def transfers(server: Server, seconds: float) -> dict[str, float]:
    """Gives the seconds of a fork, a state's download and upload, and a step, one after the other by one client."""
    connection = Connection(server.port)
    session = connection.ask_json("/sessions", {})["session"]
    path = f"/sessions/{session}"
    download = f"GET {path}/state HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
    state = connection.ask(download).partition(b"\r\n\r\n")[2]
    asked = {
        "alone step": request(f"{path}/step", json.dumps({"x": numbers(FEATURES)}).encode()),
        "alone fork": request(f"{path}/fork", b"{}"),
        "alone read": download,
        "alone write": request(f"{path}/state", state, CONTENT).replace(b"POST", b"PUT", 1),
    }
    return {name: 1 / drive([Connection(server.port)], [[data]], seconds).rate for name, data in asked.items()}


def step_latency(server: Server, seconds: float) -> float:
    """Gives the 99th percentile of one client's steps, one each few milliseconds, in seconds."""
    connection = Connection(server.port)
    session = connection.ask_json("/sessions", {})["session"]
    body = request(f"/sessions/{session}/step", json.dumps({"x": numbers(FEATURES)}).encode())
    load = drive([connection], [[body]], seconds, pause=0.003)
    return float(np.percentile(load.latencies, 99))


def step_latency_under_load(server: Server, seconds: float) -> float:
    """Gives the same while the clients of `Predictions` saturate the server from a process of their own."""
    process = multiprocessing.get_context("spawn").Process(target=_saturate, args=(server.port, seconds + 2))
    process.start()
    time.sleep(1.5)
    p99 = step_latency(server, seconds)
    process.kill()
    process.join()
    return p99


class _Port:
    def __init__(self, port: int) -> None:
        self.name, self.port = "cellserve", port


def _saturate(port: int, seconds: float) -> None:
    pin(LOAD_CORE)
    os.nice(10)  # the client whose latency is measured goes first
    Predictions(_Port(port)).run(seconds)  # type: ignore[arg-type]


def session_bytes(server: Server, sessions: int) -> float:
    """Gives the memory that live sessions take, over the bytes of their states."""
    before = server.resident_bytes
    connection = Connection(server.port)
    connection.upgrade("/stream")
    opened = frame(b'{"op":"open"}', 1)
    for _ in range(sessions // 100):
        connection.socket.sendall(opened * 100)
        data, left = bytearray(), 100
        while left:
            data += connection.socket.recv(1 << 20)
            while left and (size := connection.size(data)) is not None and len(data) >= size:
                del data[:size]
                left -= 1
    connection.socket.close()
    time.sleep(0.5)
    return (server.resident_bytes - before) / (sessions * 2 * UNITS * 4)


def bare(model: Path, seconds: float) -> dict[str, float]:
    """Gives ONNX Runtime's own steps a second, on the servers' core."""
    command = [sys.executable, "-m", "bench.peers.bare", str(model), str(seconds)]
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True,
        preexec_fn=lambda: pin(SERVER_CORE),
    )  # fmt: skip
    return dict(json.loads(done.stdout))
