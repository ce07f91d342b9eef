"""Memory: what one request may hold is known before the work, and what a burst of them held is given back."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.e2e.helpers import create
from tests.hostile.conftest import Beside, resident_bytes
from tests.redis_server import RedisServer
from tests.server import Serve, Server

pytestmark = pytest.mark.long

GZIP = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
MB = 2**20
LIMIT = 64 * MB  # of a request's inputs and its answer, with the default --max-body-bytes


def ones(count: int) -> bytes:
    return b"[" + b"1," * (count - 1) + b"1]"


def predict(count: int) -> bytes:
    return b'{"model":"characters","outputs":"all","sequences":[' + ones(count) + b"]}"


def v2(rows: int, time: int, as_bytes: bool) -> bytes:
    x = {"name": "x", "shape": [rows, time], "datatype": "INT32", "data": [1] * (rows * time)}
    lengths = {"name": "lengths", "shape": [rows], "datatype": "INT32", "data": [1] * rows}
    return json.dumps({"inputs": [x, lengths], "parameters": {"binary_data_output": as_bytes}}).encode()


ANSWERS: dict[str, Callable[[str], tuple[str, bytes]]] = {
    "predict": lambda _: ("/predict", predict(600_000)),
    "predict, many sequences and states": lambda _: (
        "/predict",
        b'{"model":"characters","return_states":true,"outputs":"all","sequences":['
        + b",".join([ones(20)] * 4000)
        + b"]}",
    ),
    "step": lambda session: (f"/sessions/{session}/step", b'{"outputs":"all","x":' + ones(200_000) + b"}"),
    "/v2, padding": lambda _: ("/v2/models/characters/infer", v2(4096, 300, False)),
    "/v2, padding, bytes": lambda _: ("/v2/models/characters/infer", v2(4096, 300, True)),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_small_request_does_not_make_a_huge_answer(server: Server, beside: Beside, name: str) -> None:
    with server.client() as client:
        path, body = ANSWERS[name](create(client, "characters"))
        with beside(server, f"a small request, a huge answer: {name}") as seen:
            answer = client.post(path, content=gzip.compress(body), headers=GZIP)
        assert answer.status_code == 413, answer.text[:300]
        assert "may have" in answer.text
    assert seen.grown_bytes < LIMIT


def test_a_small_grpc_request_does_not_make_a_huge_answer(serve: Serve, examples: Any, beside: Beside) -> None:
    grpc = pytest.importorskip("tritonclient.grpc")
    server = serve("--models", str(examples), "--grpc-port", "0")
    inputs = [grpc.InferInput("x", [4096, 300], "INT32"), grpc.InferInput("lengths", [4096], "INT32")]
    inputs[0].set_data_from_numpy(np.ones((4096, 300), np.int32))
    inputs[1].set_data_from_numpy(np.ones(4096, np.int32))
    with beside(server, "a small request, a huge answer: gRPC") as seen, pytest.raises(Exception, match="may have"):
        grpc.InferenceServerClient(server.grpc).infer("characters", inputs)
    assert seen.grown_bytes < LIMIT


@pytest.mark.parametrize("kind", ["JSON", "binary"])
def test_a_small_frame_does_not_make_a_huge_answer(server: Server, beside: Beside, kind: str) -> None:
    count = 400_000
    with connect(server.url.replace("http", "ws") + "/stream", max_size=None) as stream:
        stream.send(json.dumps({"op": "open", "model": "characters"}))
        handle = json.loads(stream.recv(timeout=60))["handle"]
        step = {"op": "step", "session": handle, "ref": 7, "outputs": "all", "x": [1] * count}
        with beside(server, f"a small frame, a huge answer: {kind}") as seen:
            binary = struct.pack("<5I", 1, 7, 1, count, handle) + bytes(4 * count)
            stream.send(json.dumps(step) if kind == "JSON" else binary)
            answer = stream.recv(timeout=60)
            assert isinstance(answer, str)
            told = json.loads(answer)
    assert (told["op"], told["ref"], told["problem"]["status"]) == ("error", 7, 413)
    assert seen.grown_bytes < LIMIT


def test_errors_of_many_rows_that_are_not_read_wait_in_a_window(server: Server, beside: Beside) -> None:
    rows = 256
    with connect(server.url.replace("http", "ws") + "/stream", max_size=None, close_timeout=0.1) as stream:
        stream.send(json.dumps({"op": "open", "model": "sunspots"}))
        handle = json.loads(stream.recv(timeout=60))["handle"]
        nan = struct.pack("<f", float("nan"))
        frame = struct.pack("<4I", 1, 1, rows, 1) + struct.pack("<I", handle) * rows + nan * rows
        stream.socket.settimeout(1)
        before = resident_bytes(server.process.pid)
        with beside(server, "256 failing rows a frame, unread") as seen:
            with suppress(OSError, ConnectionClosed):
                for _ in range(20_000):
                    stream.send(frame)
            held = resident_bytes(server.process.pid) - before
            stream.socket.close()  # which a send that timed out has done
    assert held < 200 * MB
    assert seen.grown_bytes < 100 * MB


@pytest.mark.parametrize("kind", ["json", "safetensors", "/v2"])
def test_a_large_answer_is_sent_in_parts(server: Server, beside: Beside, kind: str) -> None:
    with server.client() as client:
        whole: Any
        with beside(server, f"a large answer in {kind}") as seen:
            if kind == "json":
                answer = client.post("/predict", content=predict(40_000), headers={"Content-Type": "application/json"})
                whole = answer.json()["outputs"][0]
            elif kind == "/v2":
                body = v2(1, 40_000, False).replace(
                    b', {"name": "lengths", "shape": [1], "datatype": "INT32", "data": [1]}', b""
                )
                answer = client.post("/v2/models/characters/infer", content=body)
                whole = np.reshape(answer.json()["outputs"][0]["data"], answer.json()["outputs"][0]["shape"])[0]
            else:
                content = save({"x": np.ones((1, 40_000), np.int32)})
                headers = {"Content-Type": "application/x-safetensors"}
                answer = client.post("/predict?model=characters&outputs=all", content=content, headers=headers)
                whole = load(answer.content)["y"]
        session = create(client, "characters")
        for row in (0, 1):
            y = client.post(f"/sessions/{session}/step", json={"x": 1}).json()["y"]
            assert np.array_equal(np.float32(whole[row]), np.float32(y))
        assert len(whole) == 40_000
    assert seen.grown_bytes < 2 * LIMIT


def test_a_burst_of_sequences_gives_its_memory_back(server: Server, beside: Beside) -> None:
    body = b'{"model":"characters","sequences":[' + b",".join([b"[1]"] * 4096) + b"]}"

    def one(_: int) -> int:
        with server.client() as client:
            return client.post("/predict", content=body, headers={"Content-Type": "application/json"}).status_code

    with beside(server, "60 requests of 4,096 sequences each") as seen, ThreadPoolExecutor(60) as pool:
        statuses = set(pool.map(one, range(60)))
        time.sleep(4)
    assert statuses <= {200, 503}
    assert seen.grown_bytes < 100 * MB


@pytest.mark.parametrize("kind", ["lmdb", "redis"])
def test_ids_that_no_session_can_have_are_not_remembered(
    serve: Serve, examples: Path, tmp_path: Path, beside: Beside, kind: str
) -> None:
    with ExitStack() as stack:
        store = f"lmdb:{tmp_path}/store"
        if kind == "redis":
            redis = RedisServer(tmp_path)
            stack.callback(redis.stop)
            store = redis.url
        server = serve("--models", str(examples), "--store", store, fresh=True)
        with beside(server, f"100 ids of 2 MB, {kind}") as seen:
            url = server.url.replace("http", "ws") + "/stream"
            with connect(url, max_size=None) as stream:
                for number in range(100):
                    stream.send(json.dumps({"op": "attach", "session": f"{number:0{2 * MB}}"}))
                    assert json.loads(stream.recv())["problem"]["status"] == 404
        server.stop()
    assert seen.grown_bytes < 60 * MB


def test_a_socket_holds_a_window_of_bytes(server: Server, beside: Beside) -> None:
    url = server.url.replace("http", "ws") + "/stream"
    with connect(url, max_size=None, close_timeout=0.1) as stream:
        _fill_window(server, beside, stream)


def _fill_window(server: Server, beside: Beside, stream: ClientConnection) -> None:
    stream.send(json.dumps({"op": "open", "model": "vowels"}))
    handle = json.loads(stream.recv())["handle"]
    steps = 4 * MB // (4 * 12)
    frame = struct.pack("<5I", 1, 1, 1, steps, handle) + bytes(4 * 12 * steps)
    sent = 0

    def send_all() -> None:
        nonlocal sent
        with suppress(OSError, ConnectionClosed):
            for _ in range(200):
                stream.send(frame)
                sent += 1

    with beside(server, "200 binary frames of 4 MB on one socket") as seen:
        before = resident_bytes(server.process.pid)
        sending = threading.Thread(target=send_all)
        sending.start()
        sending.join(5)
        held = resident_bytes(server.process.pid) - before
        stream.socket.shutdown(socket.SHUT_RDWR)
        sending.join()
        time.sleep(3)
    assert sent < 100
    assert held < 200 * MB
    assert seen.grown_bytes < 100 * MB
