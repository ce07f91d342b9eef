"""Three replicas over one Redis behind nginx: whatever is killed, no step is lost and none is applied twice.

The seed is printed; SEED=... and CHAOS_SECONDS=... set it and how long it goes on.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cellserve.service.runtime.onnx_model import Runtime
from tests.helpers import FEATURES, ROOT, free_port, until
from tests.redis_server import RedisServer

SESSIONS, REPLICAS = 200, 3
SECONDS = float(os.environ.get("CHAOS_SECONDS", "60"))
MODELS = ("lstm", "rnn")


class Replica:
    """A server that is killed and started again on the same port."""

    def __init__(self, repository: Path, store: str, folder: Path) -> None:
        self.port = free_port()
        flags = "--models", str(repository), "--store", store, "--port", str(self.port), "--store-timeout-seconds", "1"
        self.command = [sys.executable, "-m", "cellserve.cli", "serve", *flags]
        self.log = folder / f"replica-{self.port}.log"
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

    def ready(self) -> bool:
        return httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=1).status_code == 200

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Cluster:
    """The replicas, their store and what balances between them."""

    def __init__(self, repository: Path, folder: Path) -> None:
        (folder / "redis").mkdir()
        self.redis = RedisServer(folder / "redis")
        self.replicas = [Replica(repository, self.redis.url, folder) for _ in range(REPLICAS)]
        self.port = free_port()
        text = (ROOT / "deploy" / "nginx.conf").read_text().replace("listen 8080", f"listen 127.0.0.1:{self.port}")
        lines = text.splitlines()
        first = next(number for number, line in enumerate(lines) if "server replica-1" in line)
        lines[first : first + 2] = [
            lines[first].replace("replica-1:8000", f"127.0.0.1:{replica.port}") for replica in self.replicas
        ]
        config = folder / "nginx.conf"
        config.write_text("\n".join(lines).replace("/tmp/nginx", str(folder / "nginx")))
        program = shutil.which("nginx") or "/usr/sbin/nginx"
        command = [program, "-p", str(folder), "-c", str(config), "-g", "daemon off;"]
        with (folder / "nginx.log").open("w") as log:
            self.nginx = subprocess.Popen(command, stderr=log)
        for replica in self.replicas:
            until(replica.ready)
        self.url = f"http://127.0.0.1:{self.port}"
        until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200)

    def stop(self) -> None:
        self.nginx.terminate()
        self.nginx.wait()
        for replica in self.replicas:
            replica.kill()
        self.redis.stop()


@pytest.fixture
def cluster(repository: Path, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(repository, tmp_path)
    yield cluster
    cluster.stop()


def sequence(number: int, steps: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(steps, FEATURES)).astype(np.float32)


class Client:
    """One session's client: sends each step until it is answered, some twice at once, some again when they are late."""

    def __init__(self, number: int, seed: int, http: httpx.AsyncClient) -> None:
        self.number, self.http, self.random = number, http, random.Random(f"{seed} {number}")
        self.x = sequence(number, 20_000)
        self.url = f"/sessions/chaos-{number}"
        self.position = 0
        self.ys: list[list[float]] = []
        self.sent: list[tuple[int, int, list[list[float]]]] = []
        self.replayed = 0

    async def run(self, end: float) -> None:
        body: dict[str, Any] = {"model": MODELS[self.number % len(MODELS)]}
        assert (await self.send("PUT", self.url, body))["position"] == 0
        while time.monotonic() < end or not self.position:  # nothing is killed after the end: everybody comes to a step
            size = self.random.choice((1, 1, 2, 7, 40))
            if self.sent and self.random.random() < 0.1:
                await self.late()
            twice = 2 if self.random.random() < 0.1 else 1
            position = self.position
            answers = await asyncio.gather(*(self.step(position, size) for _ in range(twice)))
            for answer in answers:
                assert answer["position"] == position + size
                assert answer["y"] == answers[0]["y"]
            self.ys += answers[0]["y"]
            self.sent.append((position, size, answers[0]["y"]))
            self.position += size

    async def step(self, position: int, size: int) -> dict[str, Any]:
        x = self.x[position : position + size].tolist()
        return await self.send("POST", f"{self.url}/step", {"x": x, "outputs": "all", "position": position})

    async def late(self) -> None:
        """A request of long ago comes once more."""
        position, size, y = self.random.choice(self.sent)
        x = self.x[position : position + size].tolist()
        try:
            answer = await self.http.post(f"{self.url}/step", json={"x": x, "outputs": "all", "position": position})
        except httpx.HTTPError:
            return
        if answer.status_code == 200:
            assert answer.headers["idempotent-replay"] == "true"
            assert answer.json()["y"] == y
        else:
            assert answer.status_code in (409, 502, 503, 504), answer.text

    async def send(self, method: str, url: str, body: dict[str, Any]) -> dict[str, Any]:
        while True:
            try:
                answer = await self.http.request(method, url, json=body)
            except httpx.HTTPError:
                await asyncio.sleep(self.random.random() * 0.3)
                continue
            if answer.status_code in (200, 201):
                self.replayed += "idempotent-replay" in answer.headers
                return dict(answer.json())
            told = answer.json()["type"] if "json" in answer.headers.get("content-type", "") else ""
            assert answer.status_code in (502, 503, 504) or told.endswith("step-in-flight"), answer.text
            await asyncio.sleep(self.random.random() * 0.3)


@pytest.mark.long
def test_no_step_is_lost_or_doubled_while_replicas_are_killed_and_the_store_restarts(
    cluster: Cluster, repository: Path
) -> None:
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print("SEED", seed)
    random_ = random.Random(seed)

    async def chaos(end: float) -> int:
        kills, restart = 0, time.monotonic() + SECONDS / 2
        while time.monotonic() < end - 5:
            await asyncio.sleep(random_.uniform(0.5, 3))
            replica = random_.choice(cluster.replicas)
            replica.kill()
            kills += 1
            await asyncio.sleep(random_.uniform(0, 1))
            replica.start()
            if time.monotonic() > restart:
                restart = float("inf")
                cluster.redis.stop(signal.SIGKILL)
                await asyncio.sleep(random_.uniform(0.2, 2))
                cluster.redis.start()
        return kills

    kills = asyncio.run(through_chaos(cluster.url, seed, SESSIONS, SECONDS, chaos, repository))
    assert kills > SECONDS / 10


async def through_chaos(
    url: str, seed: int, sessions: int, seconds: float, chaos: Callable[[float], Awaitable[int]], repository: Path
) -> int:
    """Lets clients step their sessions while chaos reigns, and checks each of them; returns the number of kills."""
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=10, limits=limits) as http:
        clients = [Client(number, seed, http) for number in range(sessions)]
        running = [asyncio.ensure_future(client.run(end)) for client in clients]
        kills = await chaos(end)
        await asyncio.gather(*running)
    print("KILLS", kills, "STEPS", sum(client.position for client in clients))
    print("REPLAYED", sum(client.replayed for client in clients))
    runtimes = {name: Runtime(repository / name / "1" / "model.onnx") for name in MODELS}
    for client in clients:
        runtime = runtimes[MODELS[client.number % len(MODELS)]]
        x = client.x[: client.position]
        whole = runtime.run(x[None], np.array([len(x)], np.int32), runtime.zeros(1))[0][0]
        assert np.array(client.ys, np.float32).tobytes() == np.asarray(whole).tobytes(), f"session {client.number}"
    with httpx.Client(base_url=url, timeout=20) as server:
        for client in clients[:20]:
            assert server.get(client.url).json()["position"] == client.position > 0
    return kills
