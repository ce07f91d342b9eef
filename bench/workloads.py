"""The workloads: which clients send which requests. A workload can be run many times, each run gives one figure."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import save

from bench.dialects import DIALECTS, FEATURES, ask, post, request
from bench.load import Client, Generator, Load, Request, drive
from bench.rounds import Figure
from bench.servers import Server, cpu_seconds

SESSIONS, CLIENTS, FRAME = 64, 32, 256
SAFETENSORS = "application/x-safetensors"
UPGRADE = (
    b"GET /stream HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
STEP_RATE = 400  # steps per second in latency measurements: far below what saturates a server

rng = np.random.default_rng(0)


def numbers(*shape: int) -> Any:
    """Draws float32 numbers with few digits, as a client would send them, in nested lists."""
    return np.round(rng.normal(size=shape), 4).tolist()


def lengths(count: int) -> list[int]:
    """Draws sequence lengths: log-normal with median 30, clipped to 7 to 200."""
    return [int(length) for length in np.clip(np.exp(rng.normal(np.log(30), 0.7, count)), 7, 200)]


def frame(payload: bytes, opcode: int) -> bytes:
    """Returns a client's WebSocket frame (RFC 6455, section 5.2) with a mask of zeros."""
    length = len(payload)
    if length < 126:
        head = bytes((0x80 | opcode, 0x80 | length))
    elif length < 1 << 16:
        head = bytes((0x80 | opcode, 0x80 | 126)) + struct.pack(">H", length)
    else:
        head = bytes((0x80 | opcode, 0x80 | 127)) + struct.pack(">Q", length)
    return head + bytes(4) + payload


@dataclass(frozen=True, slots=True)
class Workload:
    """A load on one server.

    Args:
        server: The server.
        clients: The connections and their requests.
        beside: A process on the load's core that works for the server (a store), whose CPU time counts too.
    """

    server: Server
    clients: Sequence[Client]
    beside: int | None = None

    def __call__(self, seconds: float) -> Figure:
        """Runs a closed loop and returns the time steps per second."""
        load = self.load(seconds)
        cpu = sum(load.cpu.values()) / load.answers
        return Figure(load.steps_per_s, 1e6 * cpu, load)

    def load(self, seconds: float, rate: float | None = None, random: bool = False) -> Load:
        """Runs an open loop at a rate, or a closed loop, and returns the full result."""
        clocks = {"server": self.server.cpu_seconds}
        if (beside := self.beside) is not None:
            clocks["beside"] = lambda: cpu_seconds(beside)
        return drive(self.server.port, self.clients, seconds, rate=rate, random=random, clocks=clocks)


def steps(server: Server, sessions: int = SESSIONS, beside: int | None = None) -> Workload:
    """Returns clients with a session each that send one JSON step after the other over HTTP."""
    dialect, clients = DIALECTS[server.name], []
    for _ in range(sessions):
        session = dialect.session(server.port)
        requests = [Request(dialect.step(session, numbers(FEATURES))) for _ in range(8)]
        clients.append(Client(requests, leads=[dialect.step(session, numbers(FEATURES), first=True)]))
    return Workload(server, clients, beside)


def sockets(server: Server) -> Workload:
    """Returns 64 WebSockets with a session each that send one JSON step after the other."""
    bodies = [json.dumps({"op": "step", "session": 0, "x": numbers(FEATURES)}).encode() for _ in range(8)]
    leads = [UPGRADE] if server.name == "floor" else [UPGRADE, frame(b'{"op":"open"}', 1)]
    client = Client([Request(frame(body, 1)) for body in bodies], leads)
    return Workload(server, [client] * SESSIONS)


def binary_frames(
    server: Server, sessions: int = FRAME, model: str | None = None, features: int = FEATURES
) -> Workload:
    """Returns one WebSocket with two binary frames in flight, each for so many sessions of its own.

    Args:
        server: The server.
        sessions: Sessions of a frame.
        model: The sessions' model; None for the server's only one.
        features: Its input features.
    """
    requests = []
    for place in range(8):
        handles = np.arange(sessions, dtype="<u4") + sessions * (place % 2)
        x = rng.normal(size=(sessions, 1, features)).astype("<f4")
        body = struct.pack("<4I", 1, place, sessions, 1) + handles.tobytes() + x.tobytes()
        requests.append(Request(frame(body, 2), sessions))
    opening = json.dumps({"op": "open"} if model is None else {"op": "open", "model": model})
    leads = [UPGRADE, *[frame(opening.encode(), 1)] * (2 * sessions)]
    return Workload(server, [Client(requests, leads, depth=2)])


def predictions(server: Server, sequences: int = 1, binary: bool = False) -> Workload:
    """Returns 32 clients that send sequences of 7 to 200 time steps, in JSON or safetensors, for all outputs.

    Args:
        server: The server.
        sequences: Number of sequences per request.
        binary: Whether to send safetensors.
    """
    clients = []
    for _ in range(CLIENTS):
        own = []
        for _ in range(max(2, 16 // sequences)):
            times = lengths(sequences)
            if binary:
                x = rng.normal(size=(sum(times), FEATURES)).astype(np.float32)
                body = save({"x": x, "lengths": np.array(times, np.int32)})
                data = request("/predict?outputs=all", body, SAFETENSORS)
            else:
                data = DIALECTS[server.name].predict([numbers(time, FEATURES) for time in times])
            own.append(Request(data, sum(times)))
        clients.append(Client(own))
    return Workload(server, clients)


def transfers(server: Server) -> dict[str, Workload]:
    """Returns a single client each for steps, forks, and downloads and uploads of a state."""
    session = DIALECTS[server.name].session(server.port)
    path = f"/sessions/{session}"
    download = f"GET {path}/state HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
    state = ask(server.port, download)
    asked = {
        "step": DIALECTS[server.name].step(session, numbers(FEATURES)),
        "fork": post(f"{path}/fork", {}),
        "download": download,
        "upload": request(f"{path}/state", state, SAFETENSORS, "PUT"),
    }
    return {name: Workload(server, [Client([Request(data)])]) for name, data in asked.items()}


def latency(workload: Workload, seconds: float) -> Figure:
    """Returns the 99th percentile of a step's latency at a constant rate, in milliseconds from when it was due."""
    load = workload.load(seconds, rate=STEP_RATE)
    return Figure(load.p99_ms, None, load)


def latency_under(saturating: Workload, workload: Workload, seconds: float) -> Figure:
    """Returns the same while another load saturates the server."""
    # Niced, so that the client whose latency is measured has priority on the core that both share.
    other = Generator(saturating.server.port, saturating.clients, 1.2 * seconds + 1, warm=0.5, nice=10)
    try:
        other.wait_for_start()
        figure = latency(workload, seconds)
        other.result()  # raises if the load ended early or got bad answers
    finally:
        other.stop()
    return figure
