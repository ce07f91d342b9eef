"""Versions come and go while a real server steps sessions: nobody's session changes its model, and nobody waits."""

from __future__ import annotations

import asyncio
import json
import shutil
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load, save
from websockets.sync.client import connect

from cellserve.models.signature import MANIFEST_NAME, MODEL_NAME, STEP_NAME
from cellserve.service.runtime.onnx_model import Runtime
from tests.e2e.helpers import answered, ask, bearer, binary, create, frames, new_key
from tests.helpers import FEATURES, until
from tests.redis_server import RedisServer
from tests.server import Serve
from tests.versions import add_version, copy_of, crashing

WATCHING = "--reload-seconds", "0.1"


@pytest.fixture
def models(repository: Path, tmp_path: Path) -> Path:
    return copy_of(repository, tmp_path, "lstm", "rnn")


def truth(folder: Path, x: list[list[float]]) -> list[list[float]]:
    """What one run of a version over the whole sequence gives, in the digits of JSON."""
    step = folder / STEP_NAME
    runtime = Runtime(folder / MODEL_NAME, step=step if step.exists() else None)
    y, _ = runtime.run(np.array([x], np.float32), np.array([len(x)], np.int32), runtime.zeros(1))
    return [[float(str(value)) for value in row] for row in y[0]]


def float32(y: Any) -> bytes:
    return np.array(y, np.float32).tobytes()


def versions(client: httpx.Client, name: str = "lstm") -> dict[int, dict[str, Any]]:
    told = next(model for model in client.get("/models").json()["models"] if model["name"] == name)
    return {one["version"]: one for one in told["versions"]}


def until_states(client: httpx.Client, name: str, expected: dict[int, str]) -> None:
    """Asks until the versions of a model stand so."""
    ask = partial(versions, client, name)
    until(ask, lambda told: {number: one["state"] for number, one in told.items()} == expected)


async def stepping(url: str, session: str, x: list[list[float]], done: asyncio.Event, ys: list[list[float]]) -> None:
    """Steps a session until it is to stop, and once more; adds the outputs to `ys`."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while len(ys) < len(x) - 1 and not done.is_set():
            body = {"x": x[len(ys)], "position": len(ys)}
            ys.append((await client.post(f"/sessions/{session}/step", json=body)).raise_for_status().json()["y"])
            await asyncio.sleep(0.01)  # a pace: sixty sessions step at once
        await done.wait()
        answer = await client.post(f"/sessions/{session}/step", json={"x": x[len(ys)], "position": len(ys)})
        ys.append(answer.raise_for_status().json()["y"])


async def until_stepped(ys: list[list[list[float]]]) -> None:
    """Waits until every session has taken some steps."""
    async with asyncio.timeout(120):
        while min(map(len, ys)) < 10:
            await asyncio.sleep(0.02)


@pytest.mark.long
def test_every_session_keeps_its_version_when_a_new_one_arrives_under_load(models: Path, serve: Serve) -> None:
    server = serve("--models", str(models), *WATCHING)
    sequences = [frames(1000, seed) for seed in range(60)]

    async def scenario(client: httpx.Client) -> list[list[list[float]]]:
        done = asyncio.Event()
        ys: list[list[list[float]]] = [[] for _ in sequences]
        sessions = [create(client, "lstm") for _ in range(50)]
        under_way = [
            asyncio.create_task(stepping(server.url, *each))
            for each in zip(sessions, sequences[:50], repeat(done), ys[:50], strict=False)
        ]
        await until_stepped(ys[:50])
        add_version(models, "lstm", 2)
        await asyncio.to_thread(until_states, client, "lstm", {2: "serving", 1: "draining"})
        new = await asyncio.to_thread(lambda: [create(client, "lstm") for _ in range(10)])
        sessions += new
        under_way += [
            asyncio.create_task(stepping(server.url, *each))
            for each in zip(new, sequences[50:], repeat(done), ys[50:], strict=False)
        ]
        await until_stepped(ys)
        done.set()
        await asyncio.gather(*under_way)
        told = versions(client)
        assert {number: (one["state"], one["sessions"]) for number, one in told.items()} == {
            2: ("serving", 10),
            1: ("draining", 50),
        }
        assert client.get(f"/sessions/{sessions[0]}").json()["version"] == 1
        assert client.get(f"/sessions/{sessions[50]}").json()["version"] == 2
        for session in sessions[:49]:
            client.delete(f"/sessions/{session}")
        for _ in range(10):
            client.post("/models/reload").raise_for_status()  # a look at the repository
            assert versions(client)[1]["state"] == "draining"
        client.delete(f"/sessions/{sessions[49]}")
        return ys

    with server.client() as client:
        for number, ys in enumerate(asyncio.run(scenario(client))):
            version = "1" if number < 50 else "2"
            assert len(ys) > 1
            assert ys == truth(models / "lstm" / version, sequences[number])[: len(ys)], number
        until_states(client, "lstm", {2: "serving", 1: "available"})
    assert server.stop() == 0
    log = server.log[-1]
    assert "lstm version 2 serves new sessions now, instead of 1" in log
    assert "lstm version 1 is unloaded" in log
    assert "ERROR" not in log


def test_a_version_can_be_chosen_by_number_over_every_protocol(models: Path, serve: Serve) -> None:
    add_version(models, "lstm", 2)
    server = serve("--models", str(models))
    x = frames(6)
    expected = {version: truth(models / "lstm" / str(version), x) for version in (1, 2)}
    assert expected[1] != expected[2]
    with server.client() as client:
        assert {number: one["state"] for number, one in versions(client).items()} == {2: "serving", 1: "available"}
        for model, version in (("lstm:1", 1), ("lstm", 2), ("lstm:2", 2), ("lstm:1", 1)):
            body = {"model": model, "sequences": [x], "outputs": "all"}
            answer = client.post("/predict", json=body).json()
            assert (answer["model"], answer["version"], answer["outputs"][0]) == ("lstm", version, expected[version])
            content = save({"x": np.array([x], np.float32)})
            headers = {"content-type": "application/x-safetensors"}
            tensors = load(client.post(f"/predict?model={model}&outputs=all", content=content, headers=headers).content)
            assert tensors["y"].tobytes() == float32(expected[version])
            session = create(client, model)
            step = client.post(f"/sessions/{session}/step", json={"x": x, "outputs": "all"}).json()
            assert step["y"] == expected[version]
            described = client.get(f"/models/{model}").json()
            assert described["version"] == version
            assert described == client.get(f"/models/lstm/versions/{version}").json()
        for model in ("lstm:3", "lstm:0", "nobody:1", "lstm:"):
            answer = client.post("/predict", json={"model": model, "sequences": [x]})
            assert (answer.status_code, "unknown-model" in answer.json()["type"]) == (404, True)
        assert client.get("/models/lstm/versions/x").status_code == 404
        # Sessions of both versions stand in one binary frame.
        with connect(server.url.replace("http", "ws") + "/stream") as socket:
            handles = [ask(socket, op="open", model=model)["handle"] for model in ("lstm:1", "lstm", "lstm:1")]
            socket.send(binary(handles, np.array([x] * 3)))
            _, positions, statuses, y = answered(socket.recv(timeout=30))
            assert (positions, statuses) == ([6] * 3, [0] * 3)
            assert y.tobytes() == float32([expected[1], expected[2], expected[1]])
            ask(socket, op="close", session=handles[1])
            socket.send(binary(handles, np.array([x] * 3)))
            assert json.loads(socket.recv(timeout=30))["row"] == 1
            assert answered(socket.recv(timeout=30))[2] == [0, 410, 0]
            other = ask(socket, op="open", model="rnn")["handle"]
            socket.send(binary([handles[0], other], np.array([x] * 2)))
            assert "several models" in json.loads(socket.recv(timeout=30))["problem"]["detail"]


def test_a_broken_version_is_reported_in_models_and_once_in_the_log_and_removing_a_version_rolls_back(
    models: Path, serve: Serve
) -> None:
    server = serve("--models", str(models), *WATCHING)
    x = frames(3)
    body = {"model": "lstm", "sequences": [x], "outputs": "all"}
    (models / "lstm/2").mkdir()
    shutil.copy(models / "lstm/1" / MODEL_NAME, models / "lstm/2")  # half of a copy
    add_version(models, "lstm", 3, b"no model")
    with server.client() as client:
        until_states(client, "lstm", {3: "refused", 2: "refused", 1: "serving"})
        assert MANIFEST_NAME in versions(client)[2]["reason"]
        assert "not an ONNX file" in versions(client)[3]["reason"]
        assert client.post("/predict", json=body).json()["version"] == 1
        answer = client.get("/models/lstm:3")
        assert (answer.status_code, "not an ONNX file" in answer.json()["detail"]) == (404, True)
        add_version(models, "lstm", 4)
        until_states(client, "lstm", {4: "serving", 3: "refused", 2: "refused", 1: "available"})
        assert client.post("/predict", json=body).json()["outputs"][0] == truth(models / "lstm/4", x)
        session = create(client, "lstm")
        (models / "lstm/4").rename(models.parent / "4")
        until_states(client, "lstm", {4: "draining", 3: "refused", 2: "refused", 1: "serving"})
        assert client.post("/predict", json=body).json()["outputs"][0] == truth(models / "lstm/1", x)
        step = client.post(f"/sessions/{session}/step", json={"x": x, "outputs": "all"})
        assert step.json()["y"] == truth(models.parent / "4", x)
        shutil.copy(models / "lstm/1" / MANIFEST_NAME, models / "lstm/2")  # the rest of the copy
        until_states(client, "lstm", {4: "draining", 3: "refused", 2: "serving", 1: "available"})
    assert server.stop() == 0
    assert server.log[-1].count("lstm/3 is refused") == 1
    assert server.log[-1].count("lstm/2 is refused") == 1


def test_only_operators_may_reload(models: Path, serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    alice, bob = new_key("alice", keys), new_key("bob", keys)
    flags = "--reload-seconds", "0", "--api-keys-file", str(keys), "--operators", "bob"
    server = serve("--models", str(models), *flags)
    add_version(models, "lstm", 2)
    with server.client() as client:
        create_mine = partial(client.put, "/sessions/mine", json={"model": "lstm"}, headers=bearer(alice))
        assert create_mine().status_code == 201
        assert client.post("/models/reload").status_code == 401
        assert client.post("/models/reload", headers=bearer(alice)).status_code == 403
        assert client.get("/models/lstm", headers=bearer(alice)).json()["version"] == 1
        told = client.post("/models/reload", headers=bearer(bob)).json()
        assert told["loaded"] == ["lstm:2"]
        assert {model["name"]: model["version"] for model in told["models"]} == {"lstm": 2, "rnn": 1}
        assert client.post("/models/reload", headers=bearer(bob)).json()["loaded"] == []
        again = create_mine()  # a repetition, though the name means another version by now
        assert (again.status_code, again.json()["version"]) == (200, 1)
        add_version(models, "rnn", 2)
        assert client.post("/models/reload", headers=bearer(bob)).json()["loaded"] == ["rnn:2"]
        models.rename(tmp_path / "away")
        away = client.post("/models/reload", headers=bearer(bob))
        assert (away.status_code, "repository-unusable" in away.json()["type"]) == (503, True)
        assert client.get("/models/lstm", headers=bearer(alice)).json()["version"] == 2


def test_restored_sessions_keep_their_versions_and_wait_for_missing_ones(
    models: Path, serve: Serve, tmp_path: Path
) -> None:
    flags = "--models", str(models), "--store", f"lmdb:{tmp_path / 'store'}", *WATCHING
    x = frames(20)
    server = serve(*flags)
    with server.client() as client:
        sessions = {"lstm": create(client, "lstm"), "rnn": create(client, "rnn")}
        for session in sessions.values():
            client.post(f"/sessions/{session}/step", json={"x": x[:8]})
    assert server.stop() == 0
    add_version(models, "lstm", 2)
    add_version(models, "rnn", 2)
    (models / "rnn/1").rename(tmp_path / "rnn-1")
    server = serve(*flags)
    with server.client() as client:
        until_states(client, "lstm", {2: "serving", 1: "available"})
        on = client.post(f"/sessions/{sessions['lstm']}/step", json={"x": x[8:], "outputs": "all"}).json()
        assert on["y"] == truth(models / "lstm/1", x)[8:]
        until_states(client, "lstm", {2: "serving", 1: "draining"})
        waiting = client.post(f"/sessions/{sessions['rnn']}/step", json={"x": x[8:]})
        assert (waiting.status_code, "model-version-not-here" in waiting.json()["type"]) == (503, True)
        (tmp_path / "rnn-1").rename(models / "rnn/1")
        until_states(client, "rnn", {2: "serving", 1: "available"})
        on = client.post(f"/sessions/{sessions['rnn']}/step", json={"x": x[8:12], "outputs": "all"}).json()
        assert on["y"] == truth(models / "rnn/1", x)[8:12]
    assert server.stop() == 0
    server = serve(*flags)
    with server.client() as client:
        assert client.get(f"/sessions/{sessions['lstm']}").json()["position"] == 20
        assert client.get(f"/sessions/{sessions['rnn']}").json()["position"] == 12
        for session in sessions.values():
            client.delete(f"/sessions/{session}")
        # Nothing holds them any more; a version that was read for a session stays loaded for a minute.
        until_states(client, "lstm", {2: "serving", 1: "loaded"})
        until_states(client, "rnn", {2: "serving", 1: "loaded"})


@pytest.mark.long
def test_two_replicas_change_versions_one_after_the_other(
    models: Path, serve: Serve, redis: RedisServer, tmp_path: Path
) -> None:
    redis.flush()
    later = tmp_path / "later"
    shutil.copytree(models, later)
    flags = "--reload-seconds", "0", "--store", redis.url
    first, second = serve("--models", str(models), *flags), serve("--models", str(later), *flags)
    x = frames(12)
    add_version(models, "lstm", 2)
    expected = {version: truth(models / "lstm" / str(version), x) for version in (1, 2)}
    with first.client() as one, second.client() as other:
        old = create(one, "lstm")
        assert one.post("/models/reload").json()["loaded"] == ["lstm:2"]
        new = create(one, "lstm")
        ys: dict[str, list[Any]] = {old: [], new: []}

        def step(client: httpx.Client, session: str, count: int = 3) -> None:
            start = len(ys[session])
            body = {"x": x[start : start + count], "outputs": "all", "position": start}
            ys[session] += client.post(f"/sessions/{session}/step", json=body).raise_for_status().json()["y"]

        step(one, new)
        step(other, old)
        not_here = other.post(f"/sessions/{new}/step", json={"x": x[3], "position": 3})
        assert (not_here.status_code, "model-version-not-here" in not_here.json()["type"]) == (503, True)
        assert int(not_here.headers["retry-after"]) > 0
        shutil.copytree(models / "lstm/2", later / "lstm/2")
        other.post("/models/reload")
        step(other, new)
        step(one, old)
        # One that has begun with the new version alone loads the old one for the sessions of it.
        second.stop()
        third = serve("--models", str(later), *flags)
        with third.client() as another:
            assert {number: one["state"] for number, one in versions(another).items()} == {2: "serving", 1: "available"}
            step(another, old)
            step(another, new)
            assert {number: one["state"] for number, one in versions(another).items()} == {2: "serving", 1: "draining"}
            step(one, new)
            step(another, old)
    assert ys == {old: expected[1], new: expected[2]}


def test_a_socket_continues_sessions_of_a_version_that_has_to_be_loaded(
    models: Path, serve: Serve, redis: RedisServer
) -> None:
    redis.flush()
    add_version(models, "lstm", 2)
    flags = "--models", str(models), "--store", redis.url
    x = np.random.default_rng(0).normal(size=(2, 4, FEATURES)).astype(np.float32)
    with serve(*flags).client() as client:
        sessions = [create(client, model) for model in ("lstm:1", "lstm:2")]
    with connect(serve(*flags).url.replace("http", "ws") + "/stream") as socket:
        handles = [ask(socket, op="attach", session=session)["handle"] for session in sessions]
        socket.send(binary(handles, x))
        _, positions, statuses, y = answered(socket.recv(timeout=30))
    assert (positions, statuses) == ([4, 4], [0, 0])
    for row, version in enumerate(("1", "2")):
        assert y[row].tobytes() == float32(truth(models / "lstm" / version, x[row].tolist()))


def test_a_sequence_of_the_inference_protocol_keeps_its_version(models: Path, serve: Serve) -> None:
    server, x = serve("--models", str(models), *WATCHING), frames(6)

    def step(client: httpx.Client, row: list[float], path: str = "lstm", **parameters: Any) -> dict[str, Any]:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, FEATURES], "data": row}
        body = {"inputs": [tensor], "parameters": {"sequence_id": 5, **parameters}}
        answer = client.post(f"/v2/models/{path}/infer", json=body)
        return {"status": answer.status_code, **answer.json()}

    with server.client() as client:
        told = [step(client, x[0], sequence_start=True)]
        add_version(models, "lstm", 2)
        until_states(client, "lstm", {2: "serving", 1: "draining"})
        told += [step(client, row) for row in x[1:-1]]
        told.append(step(client, x[-1], "lstm/versions/1", sequence_end=True))
        assert {one["model_version"] for one in told} == {"1"}
        assert [one["outputs"][0]["data"] for one in told] == truth(models / "lstm/1", x)
        new = step(client, x[0], sequence_id=6, sequence_start=True)
        assert (new["model_version"], new["outputs"][0]["data"]) == ("2", truth(models / "lstm/2", x[:1])[0])
        other = step(client, x[1], "lstm/versions/1", sequence_id=6)
        assert (other["status"], "version 2" in other["error"]) == (409, True)
        assert client.get("/v2/models/lstm").json()["versions"] == ["2", "1"]
        index = client.post("/v2/repository/index").json()
        assert {(one["name"], one["version"], one["state"]) for one in index} >= {
            ("lstm", "1", "READY"),
            ("lstm", "2", "READY"),
        }


def test_a_version_that_crashes_onnx_runtime_ends_no_server_neither_one_that_runs_nor_one_that_starts(
    models: Path, serve: Serve
) -> None:
    server = serve("--models", str(models), *WATCHING)
    with server.client() as client:
        add_version(models, "lstm", 2, crashing(models / "lstm/1" / MODEL_NAME))
        until_states(client, "lstm", {2: "refused", 1: "serving"})
    assert server.stop() == 0
    server = serve("--models", str(models))
    with server.client() as client:
        until_states(client, "lstm", {2: "refused", 1: "serving"})
        assert client.post("/sessions", json={"model": "lstm"}).status_code == 201
    assert server.stop() == 0
    assert "ONNX Runtime crashed (SIGFPE)" in "".join(server.log)
