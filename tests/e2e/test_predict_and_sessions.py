"""Predictions and sessions over a real socket: one and the same bits however a sequence comes in."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.budgets import examples
from tests.e2e.helpers import create, frames, is_busy
from tests.helpers import FEATURES, OUTPUTS, until
from tests.server import Serve, Server

MODELS = ("lstm", "rnn", "decaying")


def test_sequences_of_unequal_lengths_are_answered_in_order(server: Server) -> None:
    sequences = [frames(steps, seed=steps) for steps in (7, 1, 90, 33)]
    with server.client() as client:
        together = client.post("/predict", json={"model": "lstm", "sequences": sequences, "outputs": "all"}).json()
        alone = [
            client.post("/predict", json={"model": "lstm", "sequences": [one], "outputs": "all"}).json()["outputs"][0]
            for one in sequences
        ]
        last = client.post("/predict", json={"model": "lstm", "sequences": sequences, "outputs": "last"}).json()
    assert together["outputs"] == alone
    assert [np.shape(y) for y in alone] == [(7, OUTPUTS), (1, OUTPUTS), (90, OUTPUTS), (33, OUTPUTS)]
    assert last["outputs"] == [y[-1] for y in alone]


def test_json_answers_to_curl_end_with_a_line_break_and_to_others_do_not(server: Server) -> None:
    x = frames(3)
    with server.client() as client:
        session = create(client, "lstm")
        for method, path, body in (
            ("POST", "/predict", {"model": "lstm", "sequences": [x]}),  # on the fast path
            ("POST", "/predict", {"model": "lstm", "sequences": [x, x]}),
            ("POST", f"/sessions/{session}/step", {"x": x[0]}),
            ("POST", f"/sessions/{session}/step", {"x": "wrong"}),
            ("GET", "/models", None),
            ("GET", "/nothing", None),
        ):
            plain, line = (
                client.request(method, path, json=body, headers={"user-agent": agent})
                for agent in ("python-httpx", "curl/8.5.0")
            )
            assert line.content.endswith(b"}\n"), path
            assert int(line.headers["content-length"]) == len(line.content)
            assert plain.content.endswith(b"}")
        state = client.get(f"/sessions/{session}/state", headers={"user-agent": "curl/8.5.0"})
        plain = client.get(f"/sessions/{session}/state")
        assert len(state.content) == len(plain.content)  # whose metadata have no order
        deleted = client.delete(f"/sessions/{session}", headers={"user-agent": "curl/8.5.0"})
        assert (deleted.status_code, deleted.content) == (204, b"")


def test_a_prediction_continues_from_the_states_that_another_returned(server: Server) -> None:
    x = frames(20)
    ask = {"model": "lstm", "outputs": "all", "return_states": True}
    with server.client() as client:
        whole = client.post("/predict", json={**ask, "sequences": [x]}).json()
        first = client.post("/predict", json={**ask, "sequences": [x[:8]]}).json()
        second = client.post("/predict", json={**ask, "sequences": [x[8:]], "states": first["states"]}).json()
    assert first["outputs"][0] + second["outputs"][0] == whole["outputs"][0]
    assert second["states"] == whole["states"]


@pytest.mark.parametrize("sequences", [1, 3000])  # in the event loop, and in the thread of long ticks
def test_a_state_that_decays_below_the_normal_numbers_becomes_zero(server: Server, sequences: int) -> None:
    ask = {"model": "decaying", "sequences": [[[0.0] * FEATURES]] * sequences, "return_states": True}
    with server.client() as client:
        shapes = client.post("/predict", json=ask).json()["states"][0]
        start = {name: np.full(np.shape(state), 2e-38).tolist() for name, state in shapes.items()}
        after = client.post("/predict", json={**ask, "states": [start] * sequences}).json()["states"]
    assert {value for states in after for state in states.values() for value in np.ravel(state)} == {0.0}


@pytest.mark.parametrize("model", MODELS)
def test_a_session_stepped_in_any_chunks_among_other_traffic_gives_the_bits_of_one_run(
    server: Server, model: str
) -> None:
    stop = threading.Event()

    def traffic() -> None:
        with server.client() as client:
            other = create(client, model)
            while not stop.is_set():
                client.post("/predict", json={"model": model, "sequences": [frames(40), frames(3)]})
                client.post(f"/sessions/{other}/step", json={"x": frames(2)})

    noise = threading.Thread(target=traffic)
    noise.start()
    try:
        with server.client() as client:

            @settings(max_examples=examples(15, 100))
            @given(st.integers(0, 1000), st.lists(st.integers(1, 40), min_size=1, max_size=8))
            def any_chunks(seed: int, chunks: list[int]) -> None:
                x = frames(sum(chunks), seed)
                body = {"model": model, "sequences": [x], "outputs": "all"}
                whole = client.post("/predict", json=body).json()["outputs"][0]
                session, position, ys = create(client, model), 0, []
                for chunk in chunks:
                    part = {"x": x[position : position + chunk], "outputs": "all"}
                    answer = client.post(f"/sessions/{session}/step", json=part).json()
                    position += chunk
                    assert answer["position"] == position
                    ys += answer["y"]
                assert ys == whole

            any_chunks()
    finally:
        stop.set()
        noise.join()


def test_steps_sent_at_once_to_one_session_are_all_applied_one_after_the_other(server: Server) -> None:
    x = frames(30)

    async def all_at_once() -> list[dict[str, Any]]:
        async with server.async_client() as client:
            session = (await client.post("/sessions", json={"model": "rnn"})).json()["session"]
            send = [client.post(f"/sessions/{session}/step", json={"x": x[0]}) for _ in x]
            return [answer.json() for answer in await asyncio.gather(*send)]

    answers = asyncio.run(all_at_once())
    with server.client() as client:
        body = {"model": "rnn", "sequences": [[x[0]] * 30], "outputs": "all"}
        whole = client.post("/predict", json=body).json()["outputs"][0]
    assert sorted(answer["position"] for answer in answers) == list(range(1, 31))
    assert all(answer["y"] == whole[answer["position"] - 1] for answer in answers)


def test_a_reset_zeroes_the_state_and_moves_the_position(server: Server) -> None:
    with server.client() as client:
        session = create(client, "lstm")
        first = client.post(f"/sessions/{session}/step", json={"x": frames(1)[0]}).json()
        assert client.post(f"/sessions/{session}/reset").json()["position"] == 2
        again = client.post(f"/sessions/{session}/step", json={"x": frames(1)[0]}).json()
        assert (again["y"], again["position"]) == (first["y"], 3)
        assert client.get(f"/sessions/{session}").json()["position"] == 3


def test_a_deleted_session_is_gone_and_deleting_again_changes_nothing(server: Server) -> None:
    with server.client() as client:
        session = create(client, "lstm")
        client.post(f"/sessions/{session}/step", json={"x": frames(2)})
        assert [client.delete(f"/sessions/{session}").status_code for _ in range(2)] == [204, 204]
        gone = client.post(f"/sessions/{session}/step", json={"x": frames(1)})
    assert gone.status_code == 410
    assert (gone.json()["reason"], gone.json()["position"]) == ("deleted", 2)


def test_ids_are_128_bits_and_all_different(server: Server) -> None:
    with server.client() as client:
        ids = {create(client, "lstm") for _ in range(50)}
    assert len(ids) == 50
    assert all(len(bytes.fromhex(one)) == 16 for one in ids)


def test_idle_sessions_expire_and_a_full_server_says_so(repository: Path, serve: Serve) -> None:
    server = serve("--models", str(repository), "--max-sessions", "2", "--session-idle-seconds", "3")
    with server.client() as client:
        first, _ = create(client, "lstm"), create(client, "rnn")
        full = client.post("/sessions", json={"model": "lstm"})
        assert full.status_code == 503
        assert int(full.headers["retry-after"]) > 0
        until(lambda: client.post("/sessions", json={"model": "lstm"}).status_code == 201)
        gone = client.get(f"/sessions/{first}")
    assert (gone.status_code, gone.json()["reason"]) == (410, "expired")


def test_sigterm_finishes_what_was_accepted_and_exits_with_0(repository: Path, serve: Serve) -> None:
    server = serve("--models", str(repository))
    answers: list[int] = []
    body = json.dumps({"model": "lstm", "sequences": [frames(4000, seed) for seed in range(8)]}).encode()
    with server.client() as client:
        assert client.get("/readyz").status_code == 200

        def ask() -> None:
            headers = {"content-type": "application/json"}
            answers.append(client.post("/predict", content=body, headers=headers).status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: answers or is_busy(client))
        os.kill(server.process.pid, signal.SIGTERM)
        asking.join()
    assert server.process.wait(timeout=60) == 0
    assert answers == [200]


def test_a_large_body_read_in_parts_gives_what_a_small_one_gives(server: Server) -> None:
    x = np.array(frames(9000), np.float32)
    cuts = [3, 5, 4000, 4002, 9000]
    sequences = np.split(x, cuts[:-1])
    with server.client() as client:
        body = {"model": "lstm", "sequences": [one.tolist() for one in sequences], "outputs": "all"}
        assert len(json.dumps(body)) > 500_000
        ours = client.post("/predict", json=body).json()["outputs"]
        apart = [
            client.post("/predict", json={**body, "sequences": [one[:2000].tolist()]}).json()["outputs"][0]
            for one in sequences
        ]
        assert [y[:2000] for y in ours] == apart
        for step, wrong in ((6123, "x"), (8000, float("inf"))):
            body["sequences"] = [
                x[:10].tolist(),
                [row if t != step else [wrong] * 5 for t, row in enumerate(x.tolist())],
            ]
            problem = client.post(
                "/predict", content=json.dumps(body), headers={"content-type": "application/json"}
            ).json()
            assert (problem["status"], problem["place"]) == (422, f"sequences[1][{step}][0]")
        body["sequences"] = [x[:10].tolist(), [row if t != 7001 else row[:3] for t, row in enumerate(x.tolist())]]
        assert client.post("/predict", json=body).json()["place"] == "sequences[1][7001]"
