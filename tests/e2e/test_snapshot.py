"""Snapshots: sessions come back after a restart, and whatever happens to the file, it is whole or refused."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import safetensors.numpy

from tests.e2e.helpers import create, frames
from tests.helpers import FEATURES
from tests.server import Serve


def test_sessions_continue_after_a_restart_where_they_were(repository: Path, serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "sessions"
    flags = "--models", str(repository), "--snapshot", str(file), "--tombstone-seconds", "600"
    x = frames(3000)
    server = serve(*flags)
    with server.client() as client:
        sessions = {model: create(client, model) for model in ("lstm", "rnn", "decaying")}
        answers = {}
        for model, session in sessions.items():
            body = {"x": x[:5], "outputs": "all", "position": 0}
            answers[model] = client.post(f"/sessions/{session}/step", json=body).json()
        assert answers["rnn"]["durable"] == "snapshot"
        large = create(client, "rnn")
        whole = {"x": x, "outputs": "all", "position": 0}
        large_answer = client.post(f"/sessions/{large}/step", json=whole).json()
        client.put("/sessions/chosen", json={"model": "lstm"})
        client.put("/sessions/reset", json={"model": "lstm"})
        client.post("/sessions/reset/reset", json={"position": 0})
        deleted = create(client, "lstm")
        client.delete(f"/sessions/{deleted}")
    assert server.stop() == 0
    server = serve(*flags)
    with server.client() as client:
        for model, session in sessions.items():
            body = {"x": x[:5], "outputs": "all", "position": 0}
            again = client.post(f"/sessions/{session}/step", json=body)
            assert (again.headers["idempotent-replay"], again.json()) == ("true", answers[model])
            on = client.post(f"/sessions/{session}/step", json={"x": x[5:50], "outputs": "all", "position": 5}).json()
            sequence = {"model": model, "sequences": [x[:50]], "outputs": "all"}
            assert on["y"] == client.post("/predict", json=sequence).json()["outputs"][0][5:]
        assert client.post(f"/sessions/{large}/step", json=whole).json() == large_answer
        assert client.put("/sessions/chosen", json={"model": "lstm"}).status_code == 200
        assert client.put("/sessions/chosen", json={"model": "rnn"}).status_code == 409
        assert client.post("/sessions/reset/reset", json={"position": 0}).headers["idempotent-replay"] == "true"
        assert client.get(f"/sessions/{deleted}").status_code == 410


def test_a_session_that_expired_while_the_server_was_down_is_answered_as_expired(
    repository: Path, serve: Serve, tmp_path: Path
) -> None:
    flags = "--models", str(repository), "--snapshot", str(tmp_path / "s")
    server = serve(*flags)
    with server.client() as client:
        session = create(client, "lstm")
    server.stop()
    server = serve(*flags, "--session-idle-seconds", "0.1")  # a restart takes longer
    with server.client() as client:
        answer = client.get(f"/sessions/{session}")
        assert (answer.status_code, answer.json()["reason"]) == (410, "expired")


def test_sessions_of_a_model_that_is_not_served_wait_until_it_is(
    repository: Path, serve: Serve, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    shutil.copytree(repository / "rnn", few / "rnn")
    file = str(tmp_path / "s")
    server = serve("--models", str(repository), "--snapshot", file)
    with server.client() as client:
        session = create(client, "lstm")
        client.post(f"/sessions/{session}/step", json={"x": frames(4)})
    server.stop()
    server = serve("--models", str(few), "--snapshot", file)
    with server.client() as client:
        answer = client.get(f"/sessions/{session}")
        assert answer.status_code == 503
        assert "model-version-not-here" in answer.json()["type"]
        assert client.put(f"/sessions/{session}", json={"model": "rnn"}).status_code == 503
    server.stop()
    server = serve("--models", str(repository), "--snapshot", file)
    with server.client() as client:
        assert client.get(f"/sessions/{session}").json()["position"] == 4


def start(repository: Path, file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cellserve.cli", "serve", "--port", "0", "--models", str(repository)]
    return subprocess.run([*command, "--snapshot", str(file)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty", "folder"])
def test_a_damaged_or_foreign_snapshot_is_refused_and_left_unchanged(
    repository: Path, serve: Serve, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "sessions"
    if damage == "folder":
        file.mkdir()
    else:
        server = serve("--models", str(repository), "--snapshot", str(file))
        with server.client() as client:
            create(client, "lstm")
        server.stop()
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        foreign = safetensors.numpy.save({"x": np.zeros(3)})
        damaged = {"cut": bytes(content[:-40]), "flipped": bytes(content), "foreign": foreign, "empty": b""}
        file.write_bytes(damaged[damage])
    before = None if damage == "folder" else file.read_bytes()
    done = start(repository, file)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("cellserve serve: ")
    assert "Traceback" not in done.stderr
    assert damage == "folder" or file.read_bytes() == before


def test_two_servers_do_not_share_a_snapshot(repository: Path, serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "sessions"
    serve("--models", str(repository), "--snapshot", str(file))
    done = start(repository, file)
    assert (done.returncode, "in use by another process" in done.stderr) == (1, True)


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.long)])
def test_a_kill_at_any_point_leaves_a_whole_snapshot(
    repository: Path, serve: Serve, tmp_path: Path, kills: int
) -> None:
    """Steps go on while snapshots are written; after each kill every session is at a place that it was at."""
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print("SEED", seed)
    random_ = random.Random(seed)
    file = tmp_path / "sessions"
    flags = "--models", str(repository), "--snapshot", str(file), "--snapshot-seconds", "0.01"
    x = [float(value) for value in range(FEATURES)]
    with (server := serve(*flags)).client() as client:
        sessions = [create(client, "decaying") for _ in range(300)]
    assert server.stop() == 0
    least = 0
    for _ in range(kills):
        server = serve(*flags)

        enough = threading.Event()

        def steps(url: str = server.url, enough: threading.Event = enough) -> None:
            """Steps sessions until the server is gone."""
            with httpx.Client(base_url=url, timeout=20) as client, suppress(httpx.HTTPError):
                before_the_kill = random_.randint(100, 1000)
                for number in itertools.count():
                    client.post(f"/sessions/{random_.choice(sessions)}/step", json={"x": x})
                    if number == before_the_kill:
                        enough.set()

        stepping = threading.Thread(target=steps)
        stepping.start()
        assert enough.wait(timeout=120)
        server.stop(signal.SIGKILL)
        stepping.join()
        with (server := serve(*flags)).client() as client:
            told = client.get("/sessions", params={"limit": 1000}).json()["sessions"]
            assert {one["session"] for one in told} == set(sessions)
            positions = sum(one["position"] for one in told)
            assert positions >= least
            least = positions
            one = max(told, key=lambda one: one["position"])
            y = client.post(f"/sessions/{one['session']}/step", json={"x": x}).json()["y"]
            body = {"model": "decaying", "sequences": [[x] * (one["position"] + 1)], "outputs": "last"}
            assert y == client.post("/predict", json=body).json()["outputs"][0]
        assert server.stop() == 0
    assert least > 0
