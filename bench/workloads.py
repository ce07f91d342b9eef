"""What is asked of the servers: who sends which requests. A workload is run as often as one likes, a figure a time."""

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
STEP_RATE = 400  # steps a second where a step's latency is measured: far from what saturates anything

rng = np.random.default_rng(0)


def numbers(*shape: int) -> Any:
    """Draws numbers as a client would send them: float32, written short."""
    return np.round(rng.normal(size=shape), 4).tolist()


def lengths(count: int) -> list[int]:
    """Draws lengths of sequences: log-normal, median 30, from 7 to 200."""
    return [int(length) for length in np.clip(np.exp(rng.normal(np.log(30), 0.7, count)), 7, 200)]


def frame(payload: bytes, opcode: int) -> bytes:
    """Writes a client's WebSocket frame (RFC 6455, section 5.2); its mask is zero."""
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
        clients: What is sent.
        beside: A process on the load's core that works for the server: a store.
    """

    server: Server
    clients: Sequence[Client]
    beside: int | None = None

    def __call__(self, seconds: float) -> Figure:
        """Runs it in a closed loop; gives time steps a second."""
        load = self.load(seconds)
        cpu = sum(load.cpu.values()) / load.answers
        return Figure(load.steps_per_s, 1e6 * cpu, load)

    def load(self, seconds: float, rate: float | None = None) -> Load:
        """Runs it; gives all that came of it."""
        clocks = {"server": self.server.cpu_seconds}
        if (beside := self.beside) is not None:
            clocks["beside"] = lambda: cpu_seconds(beside)
        return drive(self.server.port, self.clients, seconds, rate=rate, clocks=clocks)


def steps(server: Server, sessions: int = SESSIONS, beside: int | None = None) -> Workload:
    """So many clients, a session each, one JSON step after the other over HTTP."""
    dialect, clients = DIALECTS[server.name], []
    for _ in range(sessions):
        session = dialect.session(server.port)
        requests = [Request(dialect.step(session, numbers(FEATURES))) for _ in range(8)]
        clients.append(Client(requests, leads=[dialect.step(session, numbers(FEATURES), first=True)]))
    return Workload(server, clients, beside)


def sockets(server: Server) -> Workload:
    """64 WebSockets, a session each, one JSON step after the other."""
    bodies = [json.dumps({"op": "step", "session": 0, "x": numbers(FEATURES)}).encode() for _ in range(8)]
    leads = [UPGRADE] if server.name == "floor" else [UPGRADE, frame(b'{"op":"open"}', 1)]
    client = Client([Request(frame(body, 1)) for body in bodies], leads)
    return Workload(server, [client] * SESSIONS)


def binary_frames(server: Server) -> Workload:
    """One WebSocket, two frames under way on it, each of 256 sessions of its own."""
    requests = []
    for place in range(8):
        handles = np.arange(FRAME, dtype="<u4") + FRAME * (place % 2)
        x = rng.normal(size=(FRAME, 1, FEATURES)).astype("<f4")
        body = struct.pack("<4I", 1, place, FRAME, 1) + handles.tobytes() + x.tobytes()
        requests.append(Request(frame(body, 2), FRAME))
    leads = [UPGRADE, *[frame(b'{"op":"open"}', 1)] * (2 * FRAME)]
    return Workload(server, [Client(requests, leads, depth=2)])


def predictions(server: Server, sequences: int = 1, binary: bool = False) -> Workload:
    """32 clients that send sequences of 7 to 200 time steps, so many in a request, in JSON or in safetensors.

    All are answered with every time step's output.
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
    """One client that asks for a step, a fork, a state's download or its upload, one after the other."""
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
    """Gives the 99th percentile of a step at a constant rate, milliseconds from when it was due."""
    load = workload.load(seconds, rate=STEP_RATE)
    return Figure(load.p99_ms, None, load)


def latency_under(saturating: Workload, workload: Workload, seconds: float) -> Figure:
    """Gives the same while another load saturates the server."""
    # Niced: the client whose latency is measured goes first on the core that both share.
    other = Generator(saturating.server.port, saturating.clients, 1.2 * seconds + 1, warm=0.5, nice=10)
    try:
        other.wait_for_begin()
        figure = latency(workload, seconds)
        other.result()  # it was there all the time, and its answers were good
    finally:
        other.stop()
    return figure
