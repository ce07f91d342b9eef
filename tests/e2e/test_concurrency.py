"""Many clients at once: whatever else the server does, each session gets the bits of one run over its sequence."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.asyncio.client import connect

from cellserve.service.runtime.onnx_model import Runtime
from tests.helpers import FEATURES, OUTPUTS
from tests.server import Serve, Server

SESSIONS, STEPS = 200, 60
MODELS = ("lstm", "rnn", "decaying")
JSON = {"content-type": "application/json"}


def sequence(seed: int, steps: int = STEPS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(steps, FEATURES)).astype(np.float32)


def truth(repository: Path) -> Callable[[str, np.ndarray], np.ndarray]:
    """What one run of ONNX Runtime over each whole sequence, alone, gives."""
    runtimes = {}
    for name in MODELS:
        folder = repository / name / "1"
        step = folder / "step.onnx"
        runtimes[name] = Runtime(folder / "model.onnx", step=step if step.exists() else None)

    def run(model: str, x: np.ndarray) -> np.ndarray:
        runtime = runtimes[model]
        return np.asarray(runtime.run(x[None], np.array([len(x)], np.int32), runtime.zeros(1))[0][0])

    return run


def chunks(random_: random.Random) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < STEPS:
        sizes.append(min(random_.choice((1, 1, 1, 2, 5, 20, 40)), STEPS - sum(sizes)))
    return sizes


@asynccontextmanager
async def traffic(server: Server) -> AsyncIterator[None]:
    """Random predictions, clients that leave before their answer, bodies that do not fit, for as long as it runs."""
    stop = asyncio.Event()

    async def predict(seed: int) -> None:
        random_ = random.Random(seed)
        async with server.async_client() as client:
            while not stop.is_set():
                model = random_.choice(MODELS)
                sequences = [sequence(seed, random_.randint(1, 150)).tolist() for _ in range(random_.randint(1, 6))]
                answer = await client.post("/predict", json={"model": model, "sequences": sequences})
                assert answer.status_code == 200

    async def leave(seed: int) -> None:
        random_ = random.Random(seed)
        body = json.dumps({"model": "lstm", "sequences": [sequence(1, 3000).tolist()] * 3}).encode()
        async with server.async_client() as client:
            while not stop.is_set():
                with contextlib.suppress(httpx.TimeoutException):
                    seconds = random_.choice((0.001, 0.01, 0.05))
                    await client.post("/predict", content=body, headers=JSON, timeout=seconds)
                await asyncio.sleep(0.1)  # a pace, for the others to be served too

    async def poison(seed: int) -> None:
        async with server.async_client() as client:
            session = (await client.post("/sessions", json={"model": "rnn"})).json()["session"]
            while not stop.is_set():
                content = b'{"x": [1, 2, NaN, 4, 5]}'
                bad = await client.post(f"/sessions/{session}/step", content=content, headers=JSON)
                assert bad.status_code == 422
                huge = await client.post("/predict", json={"model": "rnn", "sequences": [[[3e38] * FEATURES] * 5]})
                assert huge.status_code == 200  # the sums overflow, and tanh saturates

    others = [asyncio.create_task(act(number)) for number, act in enumerate((predict, predict, leave, poison))]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*others)


def check(all_: dict[int, np.ndarray], run: Callable[[str, np.ndarray], np.ndarray]) -> None:
    assert len(all_) == SESSIONS
    for number, y in all_.items():
        assert y.tobytes() == run(MODELS[number % 3], sequence(number)).tobytes(), f"session {number}"


@pytest.mark.long
def test_200_concurrent_sessions_are_exact_over_http(server: Server, repository: Path) -> None:
    results: dict[int, np.ndarray] = {}

    async def session(number: int) -> None:
        x, ys = sequence(number), []
        async with server.async_client(timeout=120) as client:
            answer = await client.post("/sessions", json={"model": MODELS[number % 3]})
            url, done = f"/sessions/{answer.json()['session']}/step", 0
            for size in chunks(random.Random(number)):
                answer = await client.post(url, json={"x": x[done : done + size].tolist(), "outputs": "all"})
                done += size
                assert answer.json()["position"] == done, answer.text
                ys += answer.json()["y"]
        results[number] = np.array(ys, np.float32)

    async def everyone() -> None:
        async with traffic(server):
            await asyncio.gather(*(session(number) for number in range(SESSIONS)))

    asyncio.run(everyone())
    check(results, truth(repository))


@pytest.mark.parametrize("sockets", [pytest.param(1, marks=pytest.mark.long), 20])
def test_200_concurrent_sessions_are_exact_over_json_frames(server: Server, repository: Path, sockets: int) -> None:
    results: dict[int, np.ndarray] = {}

    async def one_socket(numbers: list[int]) -> None:
        async with connect(server.url.replace("http", "ws") + "/stream", max_size=None) as stream:
            answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

            async def ask(ref: int, **frame: Any) -> dict[str, Any]:
                answers[ref] = asyncio.get_running_loop().create_future()
                await stream.send(json.dumps({"ref": ref, **frame}))
                return await answers[ref]

            async def read() -> None:
                async for message in stream:
                    answer = json.loads(message)
                    answers[answer["ref"]].set_result(answer)

            async def session(number: int) -> None:
                x, ys, done = sequence(number), [], 0
                opened = await ask(number, op="open", model=MODELS[number % 3])
                for size in chunks(random.Random(number)):
                    part = x[done : done + size].tolist()
                    answer = await ask(number, op="step", session=opened["handle"], x=part, outputs="all")
                    done += size
                    assert answer["position"] == done, answer
                    ys += answer["y"]
                results[number] = np.array(ys, np.float32)

            reading = asyncio.create_task(read())
            await asyncio.gather(*(session(number) for number in numbers))
            reading.cancel()

    async def everyone() -> None:
        async with traffic(server):
            parts = [list(range(first, SESSIONS, sockets)) for first in range(sockets)]
            await asyncio.gather(*(one_socket(part) for part in parts))

    asyncio.run(everyone())
    check(results, truth(repository))


def test_200_concurrent_sessions_are_exact_over_binary_frames(server: Server, repository: Path) -> None:
    results: dict[int, list[np.ndarray]] = {number: [] for number in range(SESSIONS)}

    async def one_model(place: int) -> None:
        """Frames of any of the model's sessions, by as many steps as all of these have left at least."""
        numbers = list(range(place, SESSIONS, 3))
        random_ = random.Random(place)
        left = dict.fromkeys(numbers, STEPS)
        async with connect(server.url.replace("http", "ws") + "/stream", max_size=None) as stream:
            for _ in numbers:
                await stream.send(json.dumps({"op": "open", "model": MODELS[place]}))
            handles = {number: json.loads(await stream.recv())["handle"] for number in numbers}
            while left:
                chosen = random_.sample(sorted(left), random_.randint(1, len(left)))
                steps = random_.randint(1, min(left[number] for number in chosen))
                parts = [sequence(number)[STEPS - left[number] :][:steps] for number in chosen]
                head = struct.pack("<4I", 1, 0, len(chosen), steps)
                await stream.send(
                    head + np.array([handles[number] for number in chosen], "<u4").tobytes() + np.stack(parts).tobytes()
                )
                message = await stream.recv()
                assert isinstance(message, bytes)
                y = np.frombuffer(message, "<f4", offset=16 + 12 * len(chosen)).reshape(len(chosen), steps, OUTPUTS)
                for row, number in enumerate(chosen):
                    results[number].append(y[row])
                    left[number] -= steps
                    if not left[number]:
                        del left[number]

    async def everyone() -> None:
        async with traffic(server):
            await asyncio.gather(*(one_model(place) for place in range(3)))

    asyncio.run(everyone())
    check({number: np.concatenate(ys) for number, ys in results.items()}, truth(repository))


def test_a_full_queue_answers_503_at_once_and_the_rest_is_answered(repository: Path, serve: Serve) -> None:
    server = serve("--models", str(repository), "--max-queued-steps", "20000")

    async def everyone() -> list[httpx.Response]:
        async with server.async_client(timeout=120) as client:
            body = json.dumps({"model": "decaying", "sequences": [sequence(0, 9000).tolist()] * 2}).encode()
            send = [client.post("/predict", content=body, headers=JSON) for _ in range(12)]
            return list(await asyncio.gather(*send))

    answers = asyncio.run(everyone())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in answers if answer.status_code == 503)
    with server.client() as client:
        assert client.post("/predict", json={"model": "decaying", "sequences": [[[0] * FEATURES]]}).status_code == 200
