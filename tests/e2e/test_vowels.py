"""The example models in a real server, on the real data that they were tested on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from cellserve.models.datasets import vowels
from tests.server import start_server


@pytest.fixture(scope="module")
def client(examples: Path) -> Iterator[httpx.Client]:
    server = start_server("--models", str(examples))
    with server.client() as client:
        yield client
    assert server.stop() == 0


def test_the_whole_test_split_gives_the_accuracy_that_the_model_file_states(client: httpx.Client) -> None:
    test, model = vowels().test, client.get("/models/vowels").json()
    sequences = [x[:length].tolist() for x, length in zip(test.x, test.lengths, strict=True)]
    answer = client.post("/predict", json={"model": "vowels", "sequences": sequences}).json()
    right = [model["labels"][y] == label for y, label in zip(test.y, answer["labels"], strict=True)]
    assert np.mean(right) == pytest.approx(model["metrics"]["accuracy"])
    assert np.mean(right) >= 0.97
    assert np.allclose(np.sum(answer["outputs"], axis=1), 1, atol=1e-5)  # probabilities


def test_stepping_frame_by_frame_gives_the_bits_of_predict(client: httpx.Client) -> None:
    test = vowels().test
    for number in (0, 100, 369):
        frames = test.x[number, : test.lengths[number]].tolist()
        body = {"model": "vowels", "sequences": [frames], "outputs": "all"}
        whole = client.post("/predict", json=body).json()["outputs"][0]
        session = client.post("/sessions", json={"model": "vowels"}).json()["session"]
        stepped = [client.post(f"/sessions/{session}/step", json={"x": frame}).json() for frame in frames]
        assert [step["y"] for step in stepped] == whole
        assert [step["position"] for step in stepped] == list(range(1, len(frames) + 1))


@pytest.mark.parametrize("name", ["sunspots", "sunspots-jordan"])
def test_the_sunspot_models_beat_persistence_and_the_moving_average(client: httpx.Client, name: str) -> None:
    metrics = client.get(f"/models/{name}").json()["metrics"]
    assert metrics["rmse"] < min(metrics["rmse_persistence"], metrics["rmse_moving_average_12"])


def test_the_examples_of_the_openapi_document_work(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    content = paths["/predict"]["post"]["requestBody"]["content"]["application/json"]
    examples = [content["example"]] if "example" in content else [one["value"] for one in content["examples"].values()]
    assert examples
    for example in examples:
        assert client.post("/predict", json=example).status_code == 200, example
