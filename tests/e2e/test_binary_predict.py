"""`POST /predict` in safetensors: the numbers of the JSON surface, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save

from tests.helpers import FEATURES
from tests.server import Server

TYPE = {"content-type": "application/x-safetensors"}


def x(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(*shape, FEATURES)).astype(np.float32)


def test_sequences_in_safetensors_give_the_predictions_of_json(server: Server, tmp_path: Any) -> None:
    lengths = [7, 1, 90, 33]
    packed = x(sum(lengths))
    sequences = np.split(packed, np.cumsum(lengths)[:-1])
    with server.client() as client:
        ask = {
            "model": "lstm",
            "sequences": [one.tolist() for one in sequences],
            "outputs": "all",
            "return_states": True,
        }
        json_answer = client.post("/predict", json={**ask, "sequences": [one.tolist() for one in sequences]}).json()
        body = save({"x": packed, "lengths": np.array(lengths, np.int32)})
        answer = client.post("/predict?model=lstm&outputs=all&return_states=true", content=body, headers=TYPE)
        last = client.post("/predict?model=lstm&outputs=last", content=body, headers=TYPE)
        even = client.post("/predict?model=lstm&outputs=all", content=save({"x": x(4, 9)}), headers=TYPE)
        even_json = client.post(
            "/predict", json={"model": "lstm", "outputs": "all", "sequences": x(4, 9).tolist()}
        ).json()
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-safetensors"
    tensors = load(answer.content)
    expected = np.concatenate([np.array(y, np.float32) for y in json_answer["outputs"]])
    assert tensors["y"].tobytes() == expected.tobytes()
    assert tensors["lengths"].tolist() == lengths
    for name in json_answer["states"][0]:
        assert tensors[name].tolist() == np.array([state[name] for state in json_answer["states"]], "f").tolist()
    assert load(last.content)["y"].tolist() == tensors["y"][np.cumsum(lengths) - 1].tolist()
    assert load(even.content)["y"].reshape(4, 9, -1).tolist() == np.array(even_json["outputs"], "f").tolist()
    (tmp_path / "answer").write_bytes(answer.content)
    with safe_open(tmp_path / "answer", "np") as file:
        assert file.metadata() == {"model": "lstm", "version": "1"}


@pytest.mark.parametrize("query", ["model=lstm", "model=lstm&outputs=all", "model=lstm&outputs=all&return_states=true"])
@pytest.mark.parametrize("tensors", [{"x": x(1, 9)}, {"x": x(9), "lengths": np.array([9])}, {"x": x(1, 9) * np.inf}])
def test_one_sequence_is_answered_alike_on_the_fast_path_and_over_asgi(
    server: Server, query: str, tensors: dict[str, np.ndarray]
) -> None:
    with server.client() as client:
        fast, asgi = (
            client.post(f"/predict?{query}", content=save(tensors), headers=TYPE | more)
            for more in ({}, {"x-request-id": "one"})  # a request with an id takes ASGI
        )
    assert fast.status_code == asgi.status_code == (422 if np.isinf(tensors["x"]).any() else 200)
    assert fast.headers["content-type"] == asgi.headers["content-type"]
    if fast.status_code == 200:
        found, expected = load(fast.content), load(asgi.content)
        assert {name: tensor.tobytes() for name, tensor in found.items()} == {
            name: tensor.tobytes() for name, tensor in expected.items()
        }
        assert sorted(fast.content[8:300]) == sorted(asgi.content[8:300]), "shapes and metadata"
    else:
        assert fast.json()["detail"] == asgi.json()["detail"]


def test_a_prediction_can_start_from_given_states(server: Server) -> None:
    with server.client() as client:
        url = "/predict?model=rnn&outputs=all&return_states=true"
        whole = load(client.post(url, content=save({"x": x(3, 12)}), headers=TYPE).content)
        first = load(client.post(url, content=save({"x": x(3, 12)[:, :5].copy()}), headers=TYPE).content)
        states = {name: tensor for name, tensor in first.items() if name not in ("y", "lengths")}
        body = save({"x": x(3, 12)[:, 5:].copy(), **states})
        second = load(client.post(url, content=body, headers=TYPE).content)
    ys = [load_["y"].reshape(3, -1, whole["y"].shape[-1]) for load_ in (first, second, whole)]
    assert np.concatenate(ys[:2], axis=1).tobytes() == ys[2].tobytes()


@pytest.mark.parametrize(
    ("tensors", "query", "status", "told"),
    [
        (b"nothing", "", 400, "safetensors"),
        ({"z": x(2)}, "", 422, "got the tensors ['z']"),
        ({"x": x(2)}, "", 422, "x: its shape is [2, 5]"),
        ({"x": x(2, 3).astype(np.float64)}, "", 422, "x: its type is float64: send float32"),
        ({"x": np.full((1, 2, FEATURES), np.inf, np.float32)}, "", 422, "x[0][0][0]: not a finite number"),
        (
            {"x": x(5), "lengths": np.array([2, 2])},
            "",
            422,
            "lengths need [4, 5]: send the time steps of all sequences one after",
        ),
        ({"x": x(5), "lengths": np.array([5, 0])}, "", 422, "lengths: send one integer per sequence"),
        ({"x": x(5), "lengths": np.array([2.0, 3.0])}, "", 422, "lengths: send one integer per sequence"),
        ({"x": x(2, 3), "rnn.h": np.zeros((1, 1), np.float32)}, "", 422, "rnn.h"),
        ({"x": x(2, 3)}, "&outputs=some", 422, "outputs"),
        ({"x": x(2, 3)}, "&speed=high", 422, "speed"),
    ],
    ids=range(11),
)
def test_bad_tensors_are_refused_with_the_reason(
    server: Server, tensors: Any, query: str, status: int, told: str
) -> None:
    body = tensors if isinstance(tensors, bytes) else save(tensors)
    with server.client() as client:
        answer = client.post(f"/predict?model=lstm{query}", content=body, headers=TYPE)
    assert answer.status_code == status
    assert told in answer.json()["detail"], answer.text
