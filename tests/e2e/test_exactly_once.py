"""Requests that say the position they start from: applied once, however often and on whatever surface they are sent."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from websockets.sync.client import connect

from tests.e2e.helpers import create, frames, problem_kind
from tests.helpers import FEATURES, OUTPUTS
from tests.server import Serve, Server, start_server

TENSORS = {"content-type": "application/x-safetensors"}


@pytest.fixture(scope="module")
def server(repository: Path, store: str) -> Iterator[Server]:
    """A server of the small networks on each of the stores."""
    server = start_server("--models", str(repository), "--store", store)
    yield server
    assert server.stop() == 0


@pytest.mark.parametrize("steps", [1, 3, 3000])
def test_a_repeated_step_gets_the_same_answer_and_is_not_applied_again(client: httpx.Client, steps: int) -> None:
    session, x = create(client, "lstm"), frames(steps + 2)
    body = {"x": x[0] if steps == 1 else x[:steps], "outputs": "all", "position": 0}
    first = client.post(f"/sessions/{session}/step", json=body)
    assert "idempotent-replay" not in first.headers
    for _ in range(3):
        again = client.post(f"/sessions/{session}/step", json=body)
        assert (again.status_code, again.headers["idempotent-replay"], again.json()) == (200, "true", first.json())
    after = {"x": x[steps:], "outputs": "all", "position": steps}
    last = client.post(f"/sessions/{session}/step", json=after).json()
    whole = client.post("/predict", json={"model": "lstm", "sequences": [x], "outputs": "all"}).json()["outputs"][0]
    assert last["y"] == whole[steps:]
    assert last["position"] == steps + 2


@pytest.mark.parametrize(
    ("change", "type_"),
    [
        ({"position": 1}, "position-conflict"),
        ({"x": [0.5] * FEATURES, "position": 2}, "position-conflict"),  # another x than the last one had
        ({"x": [[0.0] * FEATURES] * 2, "position": 2}, "position-conflict"),
        ({"position": 9}, "session-went-back"),
    ],
)
def test_a_step_at_another_position_is_refused_with_the_sessions_position(
    client: httpx.Client, change: dict[str, Any], type_: str
) -> None:
    session, zero = create(client, "rnn"), [0.0] * FEATURES
    for position in range(3):
        client.post(f"/sessions/{session}/step", json={"x": zero, "position": position})
    refused = client.post(f"/sessions/{session}/step", json={"x": zero, **change})
    assert (refused.status_code, problem_kind(refused), refused.json()["position"]) == (409, type_, 3)
    assert client.get(f"/sessions/{session}").json()["position"] == 3


def test_a_step_may_be_repeated_over_another_protocol(server: Server, client: httpx.Client) -> None:
    session, x = create(client, "decaying"), frames(3)
    with connect(server.url.replace("http", "ws") + "/stream") as stream:
        stream.send(json.dumps({"op": "attach", "session": session}))
        stream.recv()
        first = client.post(f"/sessions/{session}/step", json={"x": x[0], "position": 0}).json()
        stream.send(json.dumps({"op": "step", "session": 0, "x": x[0], "position": 0}))
        again = json.loads(stream.recv())
        assert (again["y"], again["position"], again["replayed"]) == (first["y"], 1, True)
        stream.send(json.dumps({"op": "step", "session": 0, "x": x[1], "position": 1}))
        second = json.loads(stream.recv())
        assert "replayed" not in second
        frame = struct.pack("<4I", 2, 7, 1, 1) + np.uint32(0).tobytes() + np.uint64(1).tobytes()
        stream.send(frame + np.array(x[1], "<f4").tobytes())
        message = stream.recv()
        assert isinstance(message, bytes)
        assert struct.unpack_from("<4IQI", message) == (0x82, 7, 1, 1, 2, 1)
        assert np.frombuffer(message, "<f4", offset=28).tolist() == np.array(second["y"], np.float32).tolist()
    reject_plain_http = client.post(f"/sessions/{session}/step", json={"x": x[1], "position": 1})
    assert reject_plain_http.headers["idempotent-replay"] == "true"


def test_a_binary_frame_is_applied_repeated_or_refused_per_session(server: Server, client: httpx.Client) -> None:
    x = np.random.default_rng(0).normal(size=(4, 2, FEATURES)).astype("<f4")
    with connect(server.url.replace("http", "ws") + "/stream") as stream:
        for _ in range(4):
            stream.send('{"op": "open", "model": "lstm"}')
            stream.recv()

        def step(positions: list[int]) -> tuple[list[int], list[int], np.ndarray, list[dict[str, Any]]]:
            head = struct.pack("<4I", 2, 1, 4, 2) + np.arange(4, dtype="<u4").tobytes()
            stream.send(head + np.array(positions, "<u8").tobytes() + x.tobytes())
            errors = []
            while isinstance(message := stream.recv(timeout=30), str):
                errors.append(json.loads(message))
            reached, statuses = np.frombuffer(message, "<u8", 4, 16), np.frombuffer(message, "<u4", 4, 48)
            return reached.tolist(), statuses.tolist(), np.frombuffer(message, "<f4", offset=64), errors

        positions, statuses, y, _ = step([0, 0, 0, 0])
        assert (positions, statuses) == ([2, 2, 2, 2], [0, 0, 0, 0])
        positions, statuses, again, errors = step([0, 2, 0, 7])
        assert (positions, statuses) == ([2, 4, 2, 2], [1, 0, 1, 409])
        assert [(error["row"], error["problem"]["position"]) for error in errors] == [(3, 2)]
        y, again = y.reshape(4, 2, OUTPUTS), again.reshape(4, 2, OUTPUTS)
        assert again[[0, 2]].tolist() == y[[0, 2]].tolist()
        assert not again[3].any()


def test_resets_and_uploads_move_the_position_by_one_and_are_applied_once(client: httpx.Client) -> None:
    session, x = create(client, "lstm"), frames(2)
    first = client.post(f"/sessions/{session}/step", json={"x": x[0], "position": 0}).json()
    state = client.get(f"/sessions/{session}/state")
    for replay in (None, "true"):
        answer = client.post(f"/sessions/{session}/reset", json={"position": 1})
        assert (answer.json()["position"], answer.headers.get("idempotent-replay")) == (2, replay)
    again = client.post(f"/sessions/{session}/step", json={"x": x[0], "position": 2}).json()
    assert (again["y"], again["position"]) == (first["y"], 3)
    for replay in (None, "true"):
        answer = client.put(f"/sessions/{session}/state?position=3", content=state.content, headers=TENSORS)
        assert (answer.json()["position"], answer.headers.get("idempotent-replay")) == (4, replay)
    assert client.post(f"/sessions/{session}/reset", json={"position": 3}).status_code == 409
    second = client.post(f"/sessions/{session}/step", json={"x": x[1], "position": 4}).json()
    whole = client.post("/predict", json={"model": "lstm", "sequences": [x], "outputs": "all"}).json()["outputs"][0]
    assert second["y"] == whole[1]


def test_creating_and_forking_under_a_chosen_id_is_safe_to_retry(client: httpx.Client) -> None:
    name = f"mine-{random.random()}"
    made = [client.put(f"/sessions/{name}", json={"model": "lstm"}) for _ in range(3)]
    assert [answer.status_code for answer in made] == [201, 200, 200]
    assert client.put(f"/sessions/{name}", json={"model": "rnn"}).status_code == 409
    x = frames(4)
    client.post(f"/sessions/{name}/step", json={"x": x[:2]})
    forked = [client.post(f"/sessions/{name}/fork", json={"session": f"{name}-2", "position": 2}) for _ in range(2)]
    assert [(answer.status_code, answer.json()["position"]) for answer in forked] == [(201, 2), (200, 2)]
    assert client.post(f"/sessions/{name}/fork", json={"position": 1}).status_code == 409
    assert client.post(f"/sessions/{name}/fork", json={"session": name}).status_code == 409
    ys = [client.post(f"/sessions/{one}/step", json={"x": x[2:]}).json()["y"] for one in (name, f"{name}-2")]
    assert ys[0] == ys[1]
    assert [client.delete(f"/sessions/{name}").status_code for _ in range(2)] == [204, 204]
    for gone in (
        client.put(f"/sessions/{name}", json={"model": "lstm"}),
        client.get(f"/sessions/{name}"),
        client.get(f"/sessions/{name}/state"),
        client.post(f"/sessions/{name}/reset"),
        client.post(f"/sessions/{name}/fork"),
        client.post(f"/sessions/{name}-2/fork", json={"session": name}),
    ):
        assert (gone.status_code, gone.json()["reason"], gone.json()["position"]) == (410, "deleted", 4)


@pytest.mark.parametrize(("name", "status"), [("a b", 422), ("x" * 129, 422), ("ü", 422), ("a%2Fb", 422)])
def test_invalid_session_ids_are_refused(client: httpx.Client, name: str, status: int) -> None:
    assert client.put(f"/sessions/{name}", json={"model": "lstm"}).status_code == status


def test_a_state_can_be_downloaded_and_uploaded_where_it_fits(client: httpx.Client) -> None:
    x = frames(6)
    first = create(client, "lstm")
    client.post(f"/sessions/{first}/step", json={"x": x[:3]})
    content = client.get(f"/sessions/{first}/state").content
    state = safetensors.numpy.load(content)
    second = create(client, "lstm")
    assert client.put(f"/sessions/{second}/state", content=content, headers=TENSORS).json()["position"] == 1
    ys = [client.post(f"/sessions/{one}/step", json={"x": x[3:]}).json()["y"] for one in (first, second)]
    assert ys[0] == ys[1]
    name = sorted(state)[0]
    bad = {
        "missing": {key: value for key, value in state.items() if key != name},
        "shape": {**state, name: state[name][:-1]},
        "type": {**state, name: state[name].astype(np.float64)},
        "number": {**state, name: np.full_like(state[name], np.nan)},
    }
    for tensors in bad.values():
        answer = client.put(f"/sessions/{second}/state", content=safetensors.numpy.save(tensors), headers=TENSORS)
        assert answer.status_code == 422
    assert client.put(f"/sessions/{second}/state", content=b"no", headers=TENSORS).status_code == 400
    assert client.put(f"/sessions/{second}/state", content=b"{}").status_code == 415
    other = create(client, "rnn")
    foreign = client.get(f"/sessions/{other}/state").content
    assert client.put(f"/sessions/{second}/state", content=foreign, headers=TENSORS).status_code == 422
    moved = {"model": "lstm", "version": "1", "digest": "0" * 64}
    answer = client.put(f"/sessions/{second}/state", content=safetensors.numpy.save(state, moved), headers=TENSORS)
    assert (answer.status_code, problem_kind(answer)) == (409, "state-of-another-model")
    assert client.get(f"/sessions/{second}").json()["position"] == 4


def test_sessions_are_listed_page_by_page(repository: Path, serve: Serve) -> None:
    server = serve("--models", str(repository))
    with server.client() as client:
        made = {create(client, model) for model in ("lstm", "rnn") for _ in range(75)}
        found: list[str] = []
        deleted: set[str] = set()
        after = "0.0"
        while after:
            page = client.get("/sessions", params={"limit": 40, "after": after}).json()
            found += [told["session"] for told in page["sessions"]]
            after = page["next"]
            deleted.add(found[-1])
            client.delete(f"/sessions/{found[-1]}")  # pages go on whatever happens meanwhile
        assert client.get("/sessions", params={"limit": 0}).status_code == 422
        assert client.get("/sessions", params={"after": "x"}).status_code == 422
        left = client.get("/sessions", params={"limit": 1000}).json()["sessions"]
    assert sorted(found) == sorted(made)
    assert {told["session"] for told in left} == made - deleted


def test_a_full_server_may_evict_the_longest_idle_session(repository: Path, serve: Serve) -> None:
    server = serve("--models", str(repository), "--max-sessions", "3", "--when-full", "evict")
    with server.client() as client:
        sessions = [create(client, "lstm") for _ in range(3)]
        client.post(f"/sessions/{sessions[0]}/step", json={"x": frames(2)})
        create(client, "rnn")
        gone = client.get(f"/sessions/{sessions[1]}")
        assert (gone.status_code, gone.json()["reason"], gone.json()["position"]) == (410, "evicted", 0)
        assert [client.get(f"/sessions/{sessions[place]}").status_code for place in (0, 2)] == [200, 200]


def test_steps_sent_twice_late_and_out_of_order_by_many_clients_are_applied_once_each(
    server: Server, client: httpx.Client
) -> None:
    x = frames(40)
    session = create(client, "decaying")

    async def sender(seed: int, http: httpx.AsyncClient, answers: dict[int, list[float]]) -> None:
        """Sends every step until it is in, now and then one that was in long ago."""
        random_, position = random.Random(seed), 0
        while position < len(x):
            place = random_.randint(0, position) if random_.random() < 0.3 else position
            answer = await http.post(f"/sessions/{session}/step", json={"x": x[place], "position": place})
            if answer.status_code == 200:
                assert answers.setdefault(place, answer.json()["y"]) == answer.json()["y"]
            else:
                assert answer.status_code == 409
            position = max(position, answer.json()["position"])

    async def everyone() -> dict[int, list[float]]:
        answers: dict[int, list[float]] = {}
        async with server.async_client() as http:
            await asyncio.gather(*(sender(seed, http, answers) for seed in range(8)))
        return answers

    answers = asyncio.run(everyone())
    assert client.get(f"/sessions/{session}").json()["position"] == len(x)
    whole = client.post("/predict", json={"model": "decaying", "sequences": [x], "outputs": "all"}).json()
    assert [answers[place] for place in sorted(answers)] == [whole["outputs"][0][place] for place in sorted(answers)]
    assert len(answers) > len(x) // 2


def test_a_step_sent_while_another_is_in_flight_must_wait(server: Server, client: httpx.Client) -> None:
    session, x = create(client, "decaying"), frames(1)[0]

    async def race() -> list[httpx.Response]:
        async with server.async_client() as http:
            long = {"x": [x] * 20000, "outputs": "last", "position": 0}
            first = asyncio.ensure_future(http.post(f"/sessions/{session}/step", json=long))
            answers = []
            while not first.done():
                answers.append(await http.post(f"/sessions/{session}/step", json={"x": x, "position": 20000}))
            return [await first, *answers]

    first, *others = asyncio.run(race())
    assert first.json()["position"] == 20000
    refused = [answer for answer in others if answer.status_code == 409]
    assert {problem_kind(answer) for answer in refused} <= {"step-in-flight", "session-went-back"}
    waiting = [answer for answer in refused if problem_kind(answer) == "step-in-flight"]
    assert waiting and all(int(answer.headers["retry-after"]) > 0 for answer in waiting)
