"""What the end-to-end tests share: requests, frames, keys, and what a server says of itself."""

from __future__ import annotations

import json
import re
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.sync.client import ClientConnection

from cellserve import Client, Retry, Timeout
from cellserve.tensors import Array
from tests.faulty_proxy import DELAY_SECONDS
from tests.fork_server import run
from tests.helpers import FEATURES, OUTPUTS, free_port
from tests.redis_server import RedisServer
from tests.server import Serve, Server

QUICK = Retry(seconds=60, first=0.02, longest=0.2)
SHORT = Timeout(connect=5, answer=DELAY_SECONDS / 2)


def frames(steps: int, seed: int = 0) -> list[list[float]]:
    """Random time steps for the small networks, as JSON has them."""
    drawn = np.random.default_rng(seed).normal(size=(steps, FEATURES)).astype(np.float32)
    return [[float(value) for value in row] for row in drawn]


def inputs(*shape: int, seed: int = 0) -> Array:
    """Random time steps for the small networks, `[*shape, FEATURES]`."""
    return np.random.default_rng(seed).standard_normal((*shape, FEATURES)).astype(np.float32)


def predict_all(client: Client, x: Any, model: str = "lstm") -> Any:
    """Returns all outputs of one run over whole sequences, by the Python client."""
    return client.predict(model, x, outputs="all").y


def create(client: httpx.Client, model: str, **body: Any) -> str:
    """Creates a session and returns its id."""
    answer = client.post("/sessions", json={"model": model, **body})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["session"])


def whole_sequence(server: Server, model: str, x: list[list[float]]) -> list[list[float]]:
    """Returns all outputs of one run over a whole sequence, by `/predict`."""
    with server.client() as client:
        body = {"model": model, "sequences": [x], "outputs": "all"}
        return list(client.post("/predict", json=body).json()["outputs"][0])


def problem_kind(answer: httpx.Response) -> str:
    """The last part of a problem's type, such as `position-conflict`."""
    return str(answer.json()["type"]).rpartition(":")[2]


def is_busy(client: httpx.Client) -> bool:
    """Whether the server has time steps that it has not answered yet."""
    return bool(re.search(r"^cellserve_queued_steps\{.*\} [1-9]", client.get("/metrics").text, re.M))


def new_key(owner: str, file: Path) -> str:
    """Makes an API key with `cellserve key`, adds it to the file and returns it."""
    made = run("key", owner, "--file", str(file))
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("cs_")  # not with what would make an option of it
    return made.stdout.strip()


def bearer(key: str) -> dict[str, str]:
    """The header that carries an API key."""
    return {"authorization": f"Bearer {key}"}


def ask(stream: ClientConnection, **frame: Any) -> dict[str, Any]:
    """Sends a JSON frame and returns the next one received."""
    stream.send(json.dumps(frame))
    return dict(json.loads(stream.recv(timeout=30)))


def binary(handles: list[int], x: np.ndarray, ref: int = 5) -> bytes:
    """A binary frame that steps sessions: `x` is `[sessions, time, features]`."""
    head = struct.pack("<4I", 1, ref, len(handles), x.shape[1])
    return head + np.array(handles, "<u4").tobytes() + x.astype("<f4").tobytes()


def answered(message: str | bytes, outputs: int = OUTPUTS) -> tuple[int, list[int], list[int], np.ndarray]:
    """Takes a binary answer apart: its ref, and positions, statuses and outputs by session."""
    assert isinstance(message, bytes)
    kind, ref, count, steps = struct.unpack_from("<4I", message)
    assert kind == 0x81
    positions = np.frombuffer(message, "<u8", count, 16).tolist()
    statuses = np.frombuffer(message, "<u4", count, 16 + 8 * count).tolist()
    y = np.frombuffer(message, "<f4", offset=16 + 12 * count).reshape(count, steps, outputs)
    return ref, positions, statuses, y


def store_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of the kind that a fixture's parameter names, as `--store` takes it."""
    if request.param == "lmdb":
        return f"lmdb:{tmp_path_factory.mktemp('store')}"
    return "memory" if request.param == "memory" else str(request.getfixturevalue("redis").url)


@contextmanager
def killed_again_and_again(
    repository: Path, serve: Serve, redis: RedisServer
) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Kills a server and starts it again on its port, twice; yields its URL and a check of whether that is over."""
    port = str(free_port())

    def start() -> Server:
        return serve("--models", str(repository), "--store", redis.url, "--port", port)

    first = start()

    def havoc() -> None:
        server = first
        for _ in range(2):
            over.wait(0.7)
            server.stop(signal.SIGKILL)
            server = start()
        over.set()

    over = threading.Event()
    thread = threading.Thread(target=havoc)
    thread.start()
    try:
        yield first.url, over.is_set
    finally:
        thread.join()
