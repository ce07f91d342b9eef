"""`python -m bench.parts FOLDER WORKLOAD`: where the processor time of a request goes within the server.

The server runs in this process, from uvicorn's protocols down, and its clients are transports without a kernel. So what
is missing beside a real server is the system's own work, and the event loop's. The lowest of many short rounds counts,
since other processes make every other one slower. FOLDER is what `python -m bench.network FOLDER` writes.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
import uvloop
from uvicorn.server import ServerState

from bench import workloads
from bench.dialects import DIALECTS, FEATURES
from bench.load import Client, Request
from cellserve.service.api import fast_path, safetensors
from cellserve.service.api.websocket.open_socket import OpenSocket
from cellserve.service.app import create_app
from cellserve.service.cli.serve import _uvicorn_options
from cellserve.service.engine import engine
from cellserve.service.engine.scheduler import RequestQueue, Tick
from cellserve.service.engine.state_arena import Arena
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.settings import Settings
from cellserve.service.validation.json_input import TensorDecoder

ROUNDS, REQUESTS = 60, 2  # of each client in a round
PARTS: tuple[tuple[Any, str, str], ...] = (
    (Runtime, "run", "ONNX Runtime"),
    (Arena, "gather", "states: read"),
    (Arena, "scatter", "states: write"),
    (engine, "is_finite", "states and outputs: finite?"),
    (Tick, "inputs", "tick: inputs"),
    (RequestQueue, "peek", "tick: choice"),
    (RequestQueue, "schedule", "tick: choice"),
    (engine.Engine, "submit", "engine: submit"),
    (engine.Engine, "_dispatch", "engine: ticks"),
    (engine.Engine, "_coalesce", "engine: ticks"),
    (engine.Engine, "_postprocess", "engine: after a tick"),
    (engine.Engine, "_commit", "sessions: positions, locks"),
    (OpenSocket, "_on_message", "frame: read, look up, lock"),
    (OpenSocket, "_answer_step", "frame: answer"),
    (OpenSocket, "_answer_frame", "frame: answer"),
    (TensorDecoder, "plain_sequences", "JSON: numbers"),
    (safetensors, "read", "safetensors: read"),
    (safetensors, "write", "safetensors: write"),
    (fast_path.FastPath, "_answer_prediction", "answer"),
    (fast_path.FastPath, "_answer_step", "answer"),
)


class Clock:
    """Measures each part's own processor time, without that of the parts it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Counts the calls of a function, or a method, as a part."""
        call = getattr(owner, name)

        def watched(*given: Any, **named: Any) -> Any:
            self._inner.append(0.0)
            start = time.thread_time()
            try:
                return call(*given, **named)
            finally:
                taken = time.thread_time() - start
                self.seconds[part] = self.seconds.get(part, 0.0) + taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        setattr(owner, name, watched)


class Wire(asyncio.Transport):
    """One client: a transport that sends the next request when an answer is written."""

    left = flight = 0  # answers to come in this round, of all clients; and requests in flight
    done: asyncio.Future[None]

    def __init__(self, client: Client, protocol: Any) -> None:
        super().__init__()
        self._requests, self._sent, self._protocol, self._leads = client.requests, 0, protocol, list(client.leads)
        self.depth, self._led = client.depth, asyncio.get_running_loop().create_future()
        protocol.connection_made(self)

    async def lead(self) -> None:
        """Sends the leads, each after the answer to the one before."""
        for data in self._leads:
            self._led = asyncio.get_running_loop().create_future()
            self._protocol.data_received(data)
            await self._led
        self._leads.clear()

    def send(self) -> None:
        """Sends the next request."""
        self._sent += 1
        self._protocol.data_received(self._requests[self._sent % len(self._requests)].data)

    def write(self, data: Any) -> None:
        """Receives an answer, which is one write."""
        if self._leads:
            if not self._led.done():
                self._led.set_result(None)
            return
        Wire.left -= 1
        if Wire.left >= Wire.flight:
            asyncio.get_running_loop().call_soon(self.send)
        elif not Wire.left:
            Wire.done.set_result(None)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Returns the client's address, and nothing else."""
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def end(self) -> None:
        """Disconnects."""
        self._protocol.connection_lost(None)

    def set_protocol(self, protocol: Any) -> None:
        """Changes to the WebSocket's protocol."""
        self._protocol = protocol

    def is_closing(self) -> bool:
        """Never."""
        return False

    def get_write_buffer_size(self) -> int:
        """Nothing waits."""
        return 0

    def pause_reading(self) -> None:
        """Has nothing to pause: the next request comes after the answer."""

    resume_reading = close = pause_reading


class InProcess:
    """What workloads need of a server; requests for sessions of its own are not sent to it."""

    name, port = "cellserve", 0


async def clients(app: Any, workload: str) -> Sequence[Client]:
    """Returns a workload's clients."""
    server: Any = InProcess()
    if workload == "steps":
        service, dialect = app.service, DIALECTS["cellserve"]
        opened = [service.sessions.create_now(service.engine("bench"))[0].id for _ in range(workloads.SESSIONS)]
        return [Client([Request(dialect.step(one, workloads.numbers(FEATURES)))]) for one in opened]
    made = {
        "websocket": lambda: workloads.sockets(server),
        "frames": lambda: workloads.binary_frames(server),
        "predict": lambda: workloads.predictions(server),
        "predict-safetensors": lambda: workloads.predictions(server, binary=True),
    }
    return made[workload]().clients


async def measure(folder: Path, workload: str) -> None:
    """Prints the parts of the fastest tenth of the rounds."""
    settings = Settings(models=folder / "artifacts")
    if not workload.startswith("predict"):  # whose ticks fill the time that one may take in the event loop
        settings = settings.model_copy(update={"inline_microseconds": 1_000_000})  # all in this thread
    app, clock, state = create_app(settings), Clock(), ServerState()
    config = uvicorn.Config(app, **_uvicorn_options(settings))
    config.load()
    await app.service.start()
    protocol: Any = config.http_protocol_class
    given = await clients(app, workload)
    wires = [Wire(one, protocol(config=config, server_state=state, app_state={})) for one in given]
    for watched in PARTS:
        clock.watch(*watched)
    clock.watch(Wire, "send", "HTTP or WebSocket")
    clock.watch(Wire, "write", "the client")
    for wire in wires:
        await wire.lead()
    Wire.flight = len(wires) * wires[0].depth
    count = REQUESTS * Wire.flight
    rounds: list[tuple[float, dict[str, float]]] = []
    for _ in range(ROUNDS):
        clock.seconds.clear()
        Wire.left, Wire.done, start = count, asyncio.get_running_loop().create_future(), time.thread_time()
        for wire in wires:
            for _ in range(wire.depth):
                wire.send()
        await Wire.done
        rounds.append(((time.thread_time() - start) / count, dict(clock.seconds)))
        await asyncio.sleep(0.01)
    for wire in wires:
        wire.end()
    await asyncio.sleep(0.1)
    await app.service.close()
    lowest = sorted(rounds, key=lambda one: one[0])[: max(1, ROUNDS // 10)]
    whole = 1e6 * float(np.mean([total for total, _ in lowest]))
    for part in sorted({name for _, parts in lowest for name in parts}):
        own = 1e6 * float(np.mean([parts.get(part, 0.0) for _, parts in lowest])) / count
        print(f"{own:9.1f} µs {own / whole:6.1%}  {part}")
    print(f"{whole:9.1f} µs a request, measuring included")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("workload", choices=["steps", "websocket", "frames", "predict", "predict-safetensors"])
    asked = parser.parse_args()
    uvloop.run(measure(asked.folder, asked.workload))
