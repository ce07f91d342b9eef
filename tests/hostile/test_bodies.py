"""Bodies that cost the server's time: other clients do not notice, and the errors stay small."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import save
from tritonclient.grpc import service_pb2, service_pb2_grpc
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.sync.client import connect

from tests.e2e.helpers import create
from tests.hostile.conftest import Beside
from tests.server import Server, start_server

pytestmark = pytest.mark.long

JSON = {"Content-Type": "application/json"}
GZIP = {**JSON, "Content-Encoding": "gzip"}
SAFETENSORS = {"Content-Type": "application/x-safetensors"}
LONGEST_ANSWER = 2000  # bytes: an error repeats at most 200 characters of its request


def deep(depth: int, wide: int, end: bytes) -> bytes:
    return b"[" * depth + b"0," * wide + end + b"]" * depth


def v2(name: str, shape: list[int], data: bytes, datatype: str = "INT32") -> bytes:
    tensor = b'{"name":"%b","shape":%b,"datatype":"%b","data":' % (
        name.encode(),
        json.dumps(shape).encode(),
        datatype.encode(),
    )
    return b'{"inputs":[' + tensor + data + b"}]}"


WRONG = deep(800, 200_000, b"NaN")
KEYS = b",".join(b'"%d":0' % number for number in range(1_000_000))
ONES = b"1," * 7_340_032 + b"1"
SPACES = b" " * (15 << 20)
STEP = "/sessions/{%s}/step"

# Name: path, body, headers, and the statuses that are right.
ATTACKS: dict[str, tuple[str, bytes, dict[str, str], tuple[int, ...]]] = {
    "a wrong number deep in a wide list": (STEP % "vowels", b'{"x":' + WRONG + b"}", JSON, (400, 422)),
    "the same in gzip": (STEP % "vowels", gzip.compress(b'{"x":' + WRONG + b"}"), GZIP, (400, 422)),
    "states, deep and wide": (
        "/sessions",
        b'{"model":"sunspots","states":{"rnn.h":' + deep(800, 100_000, b"0") + b"}}",
        JSON,
        (422,),
    ),
    "states, long": ("/sessions", b'{"model":"sunspots","states":{"rnn.h":[' + ONES + b"]}}", JSON, (422,)),
    "states, a million keys": ("/sessions", b'{"model":"sunspots","states":{' + KEYS + b"}}", JSON, (422,)),
    "states, 985 deep": (
        "/sessions",
        b'{"model":"sunspots","states":{"rnn.h":' + deep(985, 0, b"0") + b"}}",
        JSON,
        (400, 422),
    ),
    "a long key": (
        STEP % "vowels",
        b'{"x":{"' + b"k" * 307_200 + b'":[' + b"0," * 100_000 + b"NaN]}}",
        JSON,
        (400, 422),
    ),
    "a million fields": (STEP % "vowels", b"{" + KEYS + b"}", JSON, (422,)),
    "integers, the last out of range": (
        STEP % "characters",
        b'{"x":[' + ONES + b",99999999999999999999]}",
        JSON,
        (422,),
    ),
    "millions of sequences": (
        "/predict",
        b'{"model":"characters","sequences":[' + b"[1]," * 3_932_160 + b"[1]]}",
        JSON,
        (413, 422),
    ),
    "sequences that are empty": (
        "/predict",
        b'{"model":"vowels","sequences":[' + b"[]," * 5_000_000 + b"[]]}",
        JSON,
        (413, 422),
    ),
    "spaces before a number": (STEP % "sunspots", b'{"x":' + SPACES + b"[0.1]}", JSON, (200, 413, 422)),
    "spaces within a prediction": (
        "/predict",
        b'{"model":"sunspots","sequences":' + SPACES + b"[[[0.1]]]}",
        JSON,
        (200, 413, 422),
    ),
    "spaces instead of a body": ("/sessions", SPACES, JSON, (400, 413)),
    "a number of millions of digits": (STEP % "vowels", b'{"x":[' + b"1" * (15 << 20) + b"]}", JSON, (400, 413, 422)),
    "a reset of millions of spaces": ("/sessions/{sunspots}/reset", b"{" + SPACES + b"}", JSON, (413,)),
    "a reset of 5 KB": ("/sessions/{sunspots}/reset", b"{" + b" " * 5000 + b"}", JSON, (413,)),
    "a fork of 5 KB": ("/sessions/{sunspots}/fork", b"{" + b" " * 5000 + b"}", JSON, (413,)),
    "a prompt of millions of letters": (
        "/sessions/{characters}/rollout",
        b'{"steps":1,"text":"' + b"a" * (15 << 20) + "é".encode() + b'"}',
        JSON,
        (422,),
    ),
    "numbers over /v2": (
        "/v2/models/characters/infer",
        v2("x", [1, 7_340_034], b"[" + ONES + b",1.5]"),
        JSON,
        (400,),
    ),
    "numbers over /v2, one out of range": (
        "/v2/models/characters/infer",
        v2("x", [1, 7_340_034], b"[" + ONES + b",99999999999]"),
        JSON,
        (400,),
    ),
    "a million inputs over /v2": (
        "/v2/models/vowels/infer",
        b'{"inputs":[' + b'{"name":"x","shape":[],"datatype":"FP32"},' * 300_000 + b"0]}",
        JSON,
        (400,),
    ),
    "a shape of millions of axes over /v2": (
        "/v2/models/vowels/infer",
        b'{"inputs":[{"name":"x","shape":[' + ONES + b'],"datatype":"FP32","data":[1]}]}',
        JSON,
        (400,),
    ),
    "millions of lengths": (
        "/predict?model=characters",
        save({"x": np.zeros(1_900_000, np.int32), "lengths": np.ones(1_900_000, np.int32)}),
        SAFETENSORS,
        (413, 422),
    ),
    "millions of wrong numbers in safetensors": (
        "/predict?model=characters",
        save({"x": np.full((1, 4_000_000), -1, np.int32)}),
        SAFETENSORS,
        (422,),
    ),
    "a lone surrogate as a key": (STEP % "vowels", b'{"x":{"\\ud800":[NaN]}}', JSON, (400, 422)),
    "a lone surrogate in a prediction": (
        "/predict",
        b'{"model":"vowels","sequences":[[{"\\ud800":NaN}]]}',
        JSON,
        (400, 422),
    ),
    "a long id over /v2": (
        "/v2/models/characters/infer",
        b'{"id":"' + b"i" * 1001 + b'",' + v2("x", [1, 1], b"[1]")[1:],
        JSON,
        (400,),
    ),
    "a lone surrogate over /v2": (
        "/v2/models/vowels/infer",
        b'{"inputs":[{"name":"\\ud800","shape":[NaN],"datatype":"FP32","data":[1]}]}',
        JSON,
        (400,),
    ),
}


@pytest.fixture(scope="module")
def server(examples: Any) -> Iterator[Server]:
    """A server of the example models that speaks gRPC too."""
    server = start_server("--models", str(examples), "--grpc-port", "0", fresh=True)
    yield server
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_body_stalls_nobody_and_its_error_is_small(server: Server, beside: Beside, name: str) -> None:
    path, body, headers, statuses = ATTACKS[name]
    with server.client() as client:
        for model in ("vowels", "sunspots", "characters"):
            if f"{{{model}}}" in path:
                path = path.replace(f"{{{model}}}", create(client, model))
        with beside(server, name):
            answer = client.post(path, content=body, headers=headers)
    assert answer.status_code in statuses, answer.text[:300]
    assert len(answer.content) < LONGEST_ANSWER


FRAMES = {
    "a wrong number deep in a wide list": b'{"op":"step","ref":1,"session":0,"x":' + WRONG + b"}",
    "states, long": b'{"op":"open","ref":1,"model":"sunspots","states":{"rnn.h":[' + ONES + b"]}}",
    "a step of millions of numbers": b'{"op":"step","ref":1,"session":0,"x":[' + ONES + b"]}",
    "a lone surrogate": b'{"op":"step","ref":1,"session":0,"x":{"\\ud800":[NaN]}}',
    "a long ref": b'{"op":"step","session":0,"x":[0],"ref":"' + b"r" * 1_000_000 + b'"}',
    "a million fields": b'{"op":"step","session":0,' + KEYS + b"}",
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_stalls_nobody_and_the_next_is_answered(server: Server, beside: Beside, name: str) -> None:
    with connect(server.url.replace("http", "ws") + "/stream", max_size=None) as socket:
        socket.send('{"op":"open","model":"vowels"}')
        session = json.loads(socket.recv())["session"]
        with beside(server, f"{name}, in a WebSocket's frame"):
            socket.send(FRAMES[name], text=True)
            answer = socket.recv(timeout=60)
        assert json.loads(answer)["op"] == "error"
        assert len(answer) < LONGEST_ANSWER
        socket.send(json.dumps({"op": "attach", "session": session, "ref": 2}))
        assert json.loads(socket.recv(timeout=60))["ref"] == 2


def test_text_that_is_no_utf8_closes_the_socket_and_leaves_no_traceback(server: Server) -> None:
    with connect(server.url.replace("http", "ws") + "/stream") as socket:
        socket.protocol.send_frame(Frame(Opcode.TEXT, b'{"op":"\xff"}'))
        socket.socket.sendall(b"".join(socket.protocol.data_to_send()))
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=60)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1007


def test_millions_of_handles_are_refused_by_their_number(server: Server, beside: Beside) -> None:
    handles = np.zeros(3_000_000, "<u4")
    with connect(server.url.replace("http", "ws") + "/stream") as socket:
        socket.send('{"op":"open","model":"vowels"}')
        socket.recv()
        with beside(server, "millions of handles"):
            socket.send(np.array([1, 7, len(handles), 1], "<u4").tobytes() + handles.tobytes())
            answer = json.loads(socket.recv(timeout=60))
    assert (answer["op"], answer["ref"]) == ("error", 7)


@pytest.mark.parametrize("name", ["millions of integers", "millions of inputs", "no protobuf"])
def test_a_grpc_message_stalls_nobody(server: Server, beside: Beside, name: str) -> None:
    if name == "millions of integers":
        request = service_pb2.ModelInferRequest(model_name="characters")
        tensor = request.inputs.add(name="x", datatype="INT32", shape=[1, 7_000_000])
        tensor.contents.int_contents.extend([1] * 6_999_999)
        content = request.SerializeToString()
    elif name == "millions of inputs":
        content = service_pb2.ModelInferRequest(model_name="characters").SerializeToString() + b"\x2a\x00" * 2_000_000
    else:
        content = b"\xff" * 1000
    with grpc.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with beside(server, f"{name} over gRPC"), pytest.raises(grpc.RpcError) as raised:
            infer(content, timeout=60)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(raised.value.details()) < LONGEST_ANSWER
        assert service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(service_pb2.ServerLiveRequest()).live
