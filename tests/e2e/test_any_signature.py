"""Models of every kind of signature behind a real server: what is stepped is what the graph gives by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import safetensors.numpy
import tritonclient.http as triton
from websockets.sync.client import ClientConnection

from cellserve.service.api.inference.tensors import DATATYPES
from cellserve.service.runtime.batch_invariance import random_inputs
from cellserve.service.runtime.tensor_layout import TensorLayout, unpack
from tests import foreign
from tests.e2e.helpers import ask
from tests.kinds import KINDS, SYMBOLS, by_hand
from tests.redis_server import RedisServer
from tests.server import Serve, Server, start_server

STEPS = 7


@pytest.fixture(scope="module")
def server(kinds: Path) -> Iterator[Server]:
    server = start_server("--models", str(kinds), "--max-whole-steps", "50")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module", params=["host", "device"])
def kept_in(request: pytest.FixtureRequest) -> Iterator[tuple[Server, str]]:
    """A server and where it keeps states: the module's, and one that takes a GPU's way on the CPU."""
    if request.param == "host":
        yield request.getfixturevalue("server"), "host"
        return
    server = start_server("--models", str(request.getfixturevalue("kinds")), "--state-memory", "device")
    yield server, "device"
    assert server.stop() == 0


def as_json(array: Any) -> Any:
    """What a client sends of inputs `[time, ...]`: of several an object of arrays."""
    names = array.dtype.names
    return array.tolist() if names is None else {name: array[name].tolist() for name in names}


def at(value: Any, steps: Any) -> Any:
    """Some time steps of what a client sends or gets."""
    return {name: tensor[steps] for name, tensor in value.items()} if isinstance(value, dict) else value[steps]


def plus(one: Any, other: Any) -> Any:
    return {name: one[name] + other[name] for name in one} if isinstance(one, dict) else one + other


def same(ours: Any, theirs: Any) -> None:
    """Whether what was answered is the same to the bit, as float32 or integers."""
    assert isinstance(ours, dict) == isinstance(theirs, dict)
    for one, other in zip(*((it.values() if isinstance(it, dict) else [it]) for it in (ours, theirs)), strict=True):
        assert np.array(one, np.float32).tobytes() == np.array(other, np.float32).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_chunks_give_one_run_over_the_sequence_and_the_graph_run_by_hand(
    kept_in: tuple[Server, str], kind: str
) -> None:
    (server, state_memory), (made, told) = kept_in, KINDS[kind]
    x, _ = random_inputs(told, 3, STEPS, np.random.default_rng(5))
    lengths = (STEPS, 4, 6)
    sequences = [as_json(row[:length]) for row, length in zip(x, lengths, strict=True)]
    with server.client() as client:
        body = {"model": kind, "sequences": sequences, "outputs": "all", "return_states": True}
        whole = client.post("/predict", json=body).json()
        print(whole)
        described = client.get(f"/models/{kind}").json()
        assert (described["exact"], described["state_memory"]) == (True, state_memory)
        session = client.post("/sessions", json={"model": kind}).json()["session"]
        steps = [at(sequences[0], 0), at(sequences[0], slice(1, 4)), at(sequences[0], slice(4, 5))]
        answers = [client.post(f"/sessions/{session}/step", json={"x": s, "outputs": "all"}).json()["y"] for s in steps]
        state = client.get(f"/sessions/{session}/state").content
        client.put(f"/sessions/{session}/state", content=state, headers={"content-type": "application/x-safetensors"})
        rest = {"x": at(sequences[0], slice(5, None)), "outputs": "all", "position": 6}
        answers.append(client.post(f"/sessions/{session}/step", json=rest).json()["y"])
        again = client.post(f"/sessions/{session}/step", json=rest)
        ended = safetensors.numpy.load(client.get(f"/sessions/{session}/state").content)
    first = {name: [value] for name, value in answers[0].items()} if isinstance(answers[0], dict) else [answers[0]]
    stepped = plus(plus(plus(first, answers[1]), answers[2]), answers[3])
    same(stepped, whole["outputs"][0])
    assert again.headers["idempotent-replay"] == "true"
    same(again.json()["y"], answers[3])
    for name, tensor in ended.items():
        assert tensor.tobytes() == np.array(whole["states"][0][name], tensor.dtype).tobytes()
    for row in range(3):
        zeros = [np.zeros((*s.shape[: s.batch_axis], 1, *s.shape[s.batch_axis :]), s.dtype) for s in told.states]
        outputs, _ = by_hand(made, told, x[row : row + 1], zeros, lengths[row])
        for t in range(lengths[row]):
            y = at(whole["outputs"][row], t)
            for ours, theirs in zip(y.values() if isinstance(y, dict) else [y], outputs[t], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["frames", "letters", "symbols", "deep-1", "counting"])
def test_json_safetensors_and_frames_give_the_same_outputs(server: Server, stream: ClientConnection, kind: str) -> None:
    told = KINDS[kind][1]
    x, _ = random_inputs(told, 4, 3, np.random.default_rng(6))
    inputs, outputs = TensorLayout(told.inputs), TensorLayout(told.outputs)
    one = len(told.inputs) == 1
    tensors = {"x" if one else s.name: (x if one else x[s.name].copy()) for s in told.inputs}
    joined = {name: np.concatenate(list(tensor)) for name, tensor in tensors.items()}
    headers = {"content-type": "application/x-safetensors"}
    with server.client() as client:
        body = {"model": kind, "sequences": [as_json(row) for row in x], "outputs": "all"}
        answers = client.post("/predict", json=body).json()["outputs"]
        url = f"/predict?model={kind}&outputs=all"
        side_by_side = client.post(url, content=safetensors.numpy.save(tensors), headers=headers)
        lengths = {**joined, "lengths": np.array([3] * 4)}
        after = client.post(url, content=safetensors.numpy.save(lengths), headers=headers)
    for answer in (side_by_side, after):
        given = safetensors.numpy.load(answer.content)
        for row, wanted in enumerate(answers):
            rows = slice(3 * row, 3 * row + 3)
            same({s.name: given[s.name][rows] for s in told.outputs} if "y" not in given else given["y"][rows], wanted)
    for _ in range(4):
        ask(stream, op="open", model=kind)
    head = struct.pack("<4I", 1, 5, 4, 3) + np.arange(4, dtype="<u4").tobytes()
    stream.send(head + x.astype(inputs.frame_dtype).tobytes())
    message = stream.recv(timeout=30)
    assert isinstance(message, bytes)
    y = np.frombuffer(message, outputs.dtype, offset=16 + 12 * 4).reshape(4, 3, *outputs.shape)
    for row, wanted in enumerate(answers):
        same(outputs.to_json(y[row]), wanted)
    single = ask(stream, op="step", session=0, x=at(as_json(x[1]), 0))
    assert single["position"] == 4


@pytest.mark.parametrize(
    ("n", "place", "told"),
    [
        (2.5, 'states["n"]', "expected an integer, got a number"),
        (2**70, 'states["n"]', "out of bounds"),
        ([1], 'states["n"]', "expected an integer, got an array"),
        (None, 'states["n"]', "expected an integer, got null"),
    ],
)
def test_a_state_of_integers_takes_integers(server: Server, n: Any, place: str, told: str) -> None:
    with server.client() as client:
        good = client.post("/sessions", json={"model": "counting", "states": {"n": 41}}).json()["session"]
        assert client.post(f"/sessions/{good}/step", json={"x": [0.5, 1], "outputs": "all"}).json()["y"] == [41.5, 43]
        assert client.post(f"/sessions/{good}/step", json={"x": 0.5}).json()["y"] == 43.5
        bad = client.post("/sessions", json={"model": "counting", "states": {"n": n}})
        assert (bad.status_code, bad.json()["place"]) == (422, place), bad.text
        assert told in bad.json()["detail"]


HOSTILE = [
    ("letters", 7, "x", "7 is out of bounds: send an integer from 0 to 6"),
    ("letters", -1, "x", "-1 is out of bounds"),
    ("letters", [1, 2, 700], "x[2]", "700 is out of bounds: send an integer from 0 to 6"),
    ("letters", 10**30, "x", ""),
    ("letters", [3, 10**30], "x[1]", ""),
    ("letters", 2.5, "x", "expected an integer, got a number"),
    ("letters", [1, 2.5], "x[1]", "expected an integer, got a number"),
    ("letters", True, "x", "expected an integer, got a boolean"),
    ("letters", None, "x", "expected an integer, got null"),
    ("letters", [], "x", "send at least one time step"),
    ("letters", [[1]], "x[0]", "expected an integer, got an array"),
    ("frames", 5, "x", "expected an array"),
    ("symbols", [1, 2], "x", "expected an object, got an array: the model's inputs are symbol, level: send an"),
    ("symbols", {"symbol": 1}, "x", "the model's inputs are ['level', 'symbol']"),
    ("symbols", {"symbol": 1, "level": [1, 2], "more": 3}, "x", "the model's inputs are"),
    ("symbols", {"symbol": 9, "level": [1, 2]}, 'x["symbol"]', "9 is out of bounds: send an integer from 0 to 6"),
    (
        "symbols",
        {"symbol": 1, "level": [1]},
        'x["level"]',
        "1 number where the model takes 2 (a time step is [2 numbers])",
    ),
    ("symbols", {"symbol": 1, "level": [1, "a"]}, 'x["level"][1]', "expected a number, got a string"),
    ("symbols", {"symbol": [1, 2], "level": [[1, 2]]}, "x", "differ in time steps (symbol 2, level 1)"),
    ("symbols", {"symbol": [1], "level": [1, 2]}, "x", "differ in time steps (symbol 1, level none)"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_bad_step_names_the_place_and_what_to_send(server: Server, stream: ClientConnection, number: int) -> None:
    kind, x, place, told = HOSTILE[number]
    with server.client() as client:
        session = client.post("/sessions", json={"model": kind}).json()["session"]
        answer = client.post(f"/sessions/{session}/step", json={"x": x})
        framed = ask(stream, op="step", session=session, x=x)
        assert answer.status_code == 422, answer.text
        assert answer.json()["place"] == place, answer.text
        assert told in answer.json()["detail"]
        assert framed["problem"]["detail"] == answer.json()["detail"]
        assert framed["problem"]["place"] == place
        assert client.get(f"/sessions/{session}").json()["position"] == 0


@pytest.mark.parametrize(
    ("body", "place", "told"),
    [
        ({"model": "letters", "sequences": [[1, 2], [3, 9]]}, "sequences[1][1]", "9 is out of bounds"),
        ({"model": "letters", "sequences": [[1, 2.0]]}, "sequences[0][1]", "expected an integer"),
        ({"model": "letters", "sequences": [[[1.0]]]}, "sequences[0][0]", "expected an integer, got an array"),
        ({"model": "letters", "sequences": [[]]}, "sequences[0]", "send at least one time step"),
        ({"model": "symbols", "sequences": [[1]]}, "sequences[0]", "expected an object, got an array"),
        ({"model": "symbols", "sequences": [{"symbol": 1, "level": [1, 2]}]}, 'sequences[0]["symbol"]', "an array"),
        ({"model": "both-ways", "sequences": [[[1, 2, 3]]], "states": [None]}, "states", "leave it out"),
        (
            {"model": "both-ways", "sequences": [[[1, 2, 3]] * 2], "return_states": True},
            "return_states",
            "leave it out",
        ),
        (
            {"model": "both-ways", "sequences": [[[1, 2, 3]] * 2, [[1, 2, 3]]]},
            "sequences[1]",
            "needs at least 2",
        ),
        ({"model": "both-ways", "sequences": [[[1, 2, 3]] * 51]}, "", "send at most 50"),
    ],
)
def test_a_bad_prediction_names_the_place_and_what_to_send(server: Server, body: Any, place: str, told: str) -> None:
    with server.client() as client:
        answer = client.post("/predict", json=body)
    assert answer.status_code == (413 if told == "send at most 50" else 422), answer.text
    assert told in answer.json()["detail"]
    assert answer.json().get("place", "") == place, answer.text


@pytest.mark.parametrize(
    ("tensors", "place"),
    [
        ({"x": np.array([[1, 2, 9]])}, "x[0][2]"),
        ({"x": np.array([[1, 2, 2**40]])}, "x[0][2]"),
        ({"x": np.array([[1.0, 2.0]])}, "x"),
        ({"x": np.array([1, 2])}, "x"),
        ({"x": np.array([1, 2]), "lengths": np.array([2**63 - 1, 2**63 - 1])}, "x"),
    ],
)
def test_bad_integers_in_safetensors_name_the_place(server: Server, tensors: dict[str, Any], place: str) -> None:
    with server.client() as client:
        content, headers = safetensors.numpy.save(tensors), {"content-type": "application/x-safetensors"}
        answer = client.post("/predict?model=letters", content=content, headers=headers)
    assert (answer.status_code, answer.json()["place"]) == (422, place), answer.text


def test_an_integer_out_of_bounds_in_a_frame_moves_no_session(server: Server, stream: ClientConnection) -> None:
    for _ in range(2):
        ask(stream, op="open", model="letters")
    head = struct.pack("<4I", 1, 5, 2, 1) + np.arange(2, dtype="<u4").tobytes()
    stream.send(head + np.array([3, 8], "<i4").tobytes())
    answer = json.loads(stream.recv(timeout=30))
    assert answer["problem"]["place"] == "x[1][0]"
    assert ask(stream, op="step", session=0, x=1)["position"] == 1


@pytest.mark.parametrize("store", ["lmdb", pytest.param("redis", marks=pytest.mark.long)])
def test_a_repeated_step_of_any_kind_is_answered_again_after_a_restart(
    kinds: Path, serve: Serve, redis: RedisServer, tmp_path: Path, store: str
) -> None:
    kept = "--store", redis.url if store == "redis" else f"lmdb:{tmp_path / 'store'}"
    asked: list[tuple[str, dict[str, Any], Any]] = []  # a session, a step, its answer
    server = serve("--models", str(kinds), *kept)
    with server.client() as client:
        for kind in ("letters", "symbols", "deep-1", "counting"):
            x, _ = random_inputs(KINDS[kind][1], 1, 300, np.random.default_rng(7))
            for length in (2, 300):  # the answer is kept, or made again where it would be large
                session = client.post("/sessions", json={"model": kind}).json()["session"]
                body = {"x": as_json(x[0, :length]), "outputs": "all", "position": 0}
                asked.append((session, body, client.post(f"/sessions/{session}/step", json=body).json()["y"]))
    assert server.stop() == 0
    server = serve("--models", str(kinds), *kept)
    with server.client() as client:
        for session, body, y in asked:
            again = client.post(f"/sessions/{session}/step", json=body)
            assert again.headers["idempotent-replay"] == "true"
            same(again.json()["y"], y)
        for (session, _, _), (_, body, y) in zip(asked[::2], asked[1::2], strict=True):
            rest = {"x": at(body["x"], slice(2, None)), "outputs": "all", "position": 2}
            same(client.post(f"/sessions/{session}/step", json=rest).json()["y"], at(y, slice(2, None)))


def test_an_output_that_is_not_finite_moves_no_session(server: Server) -> None:
    huge = {"symbol": [1, 2, 3], "level": [[0.0, 0.0], [3e38, 3e38], [0.0, 0.0]]}
    good = {"symbol": [1, 2, 3], "level": [[0.0, 0.0]] * 3}
    with server.client() as client:
        session = client.post("/sessions", json={"model": "overflowing"}).json()["session"]
        answer = client.post(f"/sessions/{session}/step", json={"x": huge})
        assert (answer.status_code, answer.json()["step"]) == (422, 1), answer.text
        body = {"model": "overflowing", "sequences": [good, huge]}
        assert client.post("/predict", json=body).json()["place"] == "sequences[1]"
        assert client.get(f"/sessions/{session}").json()["position"] == 0
        assert client.post(f"/sessions/{session}/step", json={"x": good}).json()["position"] == 3


def test_a_model_that_mixes_rows_is_run_one_row_at_a_time(server: Server) -> None:
    x = np.random.default_rng(8).normal(size=(6, 5, 3)).astype(np.float32).tolist()
    with server.client() as client:
        assert client.get("/models/mixed").json()["exact"] is False
        together = client.post("/predict", json={"model": "mixed", "sequences": x}).json()["outputs"]
        for row in range(6):
            alone = client.post("/predict", json={"model": "mixed", "sequences": [x[row]]}).json()["outputs"][0]
            assert alone == together[row]


def test_a_model_that_mixes_rows_is_batched_only_if_that_is_asked_for_and_says_so(kinds: Path, serve: Serve) -> None:
    server = serve("--models", str(kinds), "--when-inexact", "batch")
    x = np.random.default_rng(8).normal(size=(6, 5, 3)).astype(np.float32).tolist()
    with server.client() as client:
        told = client.get("/models/mixed").json()
        assert (told["exact"], told["bits_may_differ"], told["shapes"]) == (False, True, "any shape")
        assert not client.get("/models/frames").json()["bits_may_differ"]
        assert 'cellserve_bits_may_differ{model="mixed",version="1"} 1' in client.get("/metrics").text
        together = client.post("/predict", json={"model": "mixed", "sequences": x}).json()["outputs"]
        alone = client.post("/predict", json={"model": "mixed", "sequences": x[:1]}).json()["outputs"]
        assert alone[0] != together[0]  # the mean over all rows


def test_a_model_that_cannot_be_stepped_predicts_and_says_why_there_are_no_sessions(
    server: Server, stream: ClientConnection
) -> None:
    x = np.random.default_rng(9).normal(size=(3, 40, 3)).astype(np.float32)
    sequences = [x[0].tolist(), x[1, :33].tolist(), x[2].tolist()]
    with server.client() as client:
        told = client.get("/models/both-ways").json()
        assert (told["exact"], told["signature"]["predict_only"]) == (True, "its LSTM is bidirectional")
        answer = client.post("/predict", json={"model": "both-ways", "sequences": sequences, "outputs": "all"}).json()
        refused = client.post("/sessions", json={"model": "both-ways"})
        named = client.put("/sessions/mine", json={"model": "both-ways", "states": {"s": [1]}})
        opened = ask(stream, op="open", model="both-ways")
        metrics = client.get("/metrics").text
    assert 'cellserve_steps_total{model="both-ways",version="1"} 113.0' in metrics, metrics
    session = ort.InferenceSession(foreign.both_ways().SerializeToString())
    for row, sequence in enumerate(sequences):
        (theirs,) = session.run(None, {"x": np.array([sequence], np.float32)})
        np.testing.assert_allclose(answer["outputs"][row], theirs[0], rtol=1e-5, atol=1e-6)
    for problem in (refused.json(), named.json(), opened["problem"]):
        assert problem["type"] == "urn:cellserve:problem:cannot-be-stepped"
        assert problem["status"] == 422
        assert "its LSTM is bidirectional" in problem["detail"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_inference_protocol_takes_and_gives_each_tensor_by_its_name(server: Server, kind: str) -> None:
    _, told = KINDS[kind]
    x, _ = random_inputs(told, 1, STEPS, np.random.default_rng(8))
    names = dict(zip((spec.name for spec in told.inputs), unpack(x), strict=True))

    def infer(steps: slice, **parameters: Any) -> dict[str, Any]:
        tensors = []
        for spec in told.inputs:
            tensor = triton.InferInput(spec.name, list(names[spec.name][:, steps].shape), DATATYPES[spec.dtype])
            tensor.set_data_from_numpy(np.ascontiguousarray(names[spec.name][:, steps]))
            tensors.append(tensor)
        answer = client.infer(kind, tensors, **parameters)
        return {spec.name: answer.as_numpy(spec.name) for spec in told.outputs}

    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        metadata = client.get_model_metadata(kind)
        assert [one["name"] for one in metadata["inputs"]] == list(names)
        whole = infer(slice(None))
        if told.predict_only:
            with pytest.raises(triton.InferenceServerException, match="cannot be stepped"):
                infer(slice(None), sequence_id=7, sequence_start=True)
            return
        stepped = [
            infer(slice(t, t + 1), sequence_id=7, sequence_start=t == 0, sequence_end=t == STEPS - 1)
            for t in range(STEPS)
        ]
    for name, y in whole.items():
        assert np.concatenate([one[name] for one in stepped], axis=1).tobytes() == y.tobytes()


def test_several_tensors_of_the_inference_protocol_are_matched_by_name_and_checked(server: Server) -> None:
    x, _ = random_inputs(SYMBOLS, 2, 3, np.random.default_rng(10))
    tensors = [("symbol", "INT64", x["symbol"]), ("level", "FP32", x["level"])]
    inputs: list[dict[str, Any]] = [
        {"name": n, "datatype": d, "shape": t.shape, "data": t.ravel().tolist()} for n, d, t in tensors
    ]
    with server.client() as client:
        body = {"model": "symbols", "sequences": [as_json(row) for row in x], "outputs": "all"}
        wanted = client.post("/predict", json=body).json()["outputs"]
        answer = client.post("/v2/models/symbols/infer", json={"inputs": inputs})
        assert answer.status_code == 200, answer.text
        outputs = {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in answer.json()["outputs"]}
        for row, one in enumerate(wanted):
            same({name: tensor[row] for name, tensor in outputs.items()}, one)
        missing = client.post("/v2/models/symbols/infer", json={"inputs": inputs[:1]})
        assert "send symbol, level" in missing.text
        inputs[0]["data"][4] = 7
        beyond = client.post("/v2/models/symbols/infer", json={"inputs": inputs})
        assert "symbol[1][1]: 7 is out of bounds: send an integer from 0 to 6" in beyond.text
        whole = {"name": "x", "datatype": "FP32", "shape": [1, 4, 3], "data": [0.5] * 12}
        assert client.post("/v2/models/both-ways/infer", json={"inputs": [whole]}).status_code == 200
        stepped = {"inputs": [whole], "parameters": {"sequence_id": 1, "sequence_start": True}}
        assert "cannot be stepped" in client.post("/v2/models/both-ways/infer", json=stepped).text
