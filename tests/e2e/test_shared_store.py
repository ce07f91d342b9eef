"""One Redis behind servers and their workers: away, back, gone back, full; and several processes over it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
import safetensors.numpy

from tests.e2e.helpers import create, frames
from tests.fork_server import run
from tests.helpers import free_port, until
from tests.redis_server import RedisServer
from tests.server import Serve


def stepped(client: httpx.Client, session: str, x: list[float], position: int) -> httpx.Response:
    """Sends a step until the store is there; gives the answer."""
    body = {"x": x, "position": position}
    send = partial(client.post, f"/sessions/{session}/step", json=body)
    return until(send, lambda answer: answer.status_code != 503)


def test_two_servers_serve_one_session_in_turn(repository: Path, serve: Serve, own_redis: RedisServer) -> None:
    servers = [serve("--models", str(repository), "--store", own_redis.url) for _ in range(2)]
    x = frames(40)
    with servers[0].client() as one, servers[1].client() as other:
        session, ys = create(one, "lstm"), []
        for position, row in enumerate(x):
            client = (one, other)[position // 3 % 2]
            answer = client.post(f"/sessions/{session}/step", json={"x": row}).json()  # without a position
            assert (answer["position"], answer["durable"]) == (position + 1, "store")
            ys.append(answer["y"])
        body = {"model": "lstm", "sequences": [x], "outputs": "all"}
        assert ys == one.post("/predict", json=body).json()["outputs"][0]
        states = [safetensors.numpy.load(at.get(f"/sessions/{session}/state").content) for at in (one, other)]
        assert {name: state.tobytes() for name, state in states[0].items()} == {
            name: state.tobytes() for name, state in states[1].items()
        }
        assert other.delete(f"/sessions/{session}").status_code == 204
        assert one.post(f"/sessions/{session}/step", json={"x": x[0]}).status_code == 410


def test_an_unreachable_store_is_reported_until_it_comes_back(
    repository: Path, serve: Serve, own_redis: RedisServer
) -> None:
    server = serve("--models", str(repository), "--store", own_redis.url, "--store-timeout-seconds", "2")
    x = frames(3)
    with server.client() as client:
        session = create(client, "rnn")
        first = client.post(f"/sessions/{session}/step", json={"x": x[0], "position": 0}).json()
        os.kill(own_redis.process.pid, signal.SIGSTOP)  # it takes requests and does not answer
        away = client.post(f"/sessions/{session}/step", json={"x": x[1], "position": 1})
        assert (away.status_code, "store-away" in away.json()["type"]) == (503, True)
        assert int(away.headers["retry-after"]) > 0
        body = {"model": "rnn", "sequences": [x], "outputs": "all"}
        whole = client.post("/predict", json=body).json()["outputs"][0]  # needs no store
        os.kill(own_redis.process.pid, signal.SIGCONT)
        # The write that had no answer was applied all the same: the repetition finds that out.
        again = stepped(client, session, x[1], 1)
        assert (again.status_code, again.json()["position"]) == (200, 2)
        own_redis.stop(signal.SIGKILL)
        assert client.post(f"/sessions/{session}/step", json={"x": x[2], "position": 2}).status_code == 503
        assert client.get("/healthz").status_code == 200
        own_redis.start()
        last = stepped(client, session, x[2], 2)
        assert [first["y"], again.json()["y"], last.json()["y"]] == whole


def test_a_store_that_has_gone_back_is_detected(repository: Path, serve: Serve, own_redis: RedisServer) -> None:
    server = serve("--models", str(repository), "--store", own_redis.url)
    file = next(own_redis.folder.glob("appendonlydir/*.incr.aof"))
    x = frames(5)
    with server.client() as client:
        session = create(client, "lstm")
        for position in range(2):
            client.post(f"/sessions/{session}/step", json={"x": x[position], "position": position})
        size = file.stat().st_size
        for position in range(2, 4):
            client.post(f"/sessions/{session}/step", json={"x": x[position], "position": position})
        own_redis.stop(signal.SIGKILL)
        os.truncate(file, size)  # as a failover to a replica that had not heard of the last writes
        own_redis.start()
        answer = stepped(client, session, x[4], 4)
        assert answer.status_code == 409
        assert answer.json()["type"].endswith("session-went-back")
        assert answer.json()["position"] == 2
        ys = [
            client.post(f"/sessions/{session}/step", json={"x": x[position], "position": position}).json()["y"]
            for position in range(2, 5)
        ]
        body = {"model": "lstm", "sequences": [x], "outputs": "all"}
        assert ys == client.post("/predict", json=body).json()["outputs"][0][2:]


def test_a_step_is_answered_once_enough_replicas_of_the_store_have_it(
    repository: Path, serve: Serve, own_redis: RedisServer, tmp_path: Path
) -> None:
    (tmp_path / "replica").mkdir()
    replica = RedisServer(tmp_path / "replica", "--replicaof", "127.0.0.1", str(own_redis.port))
    try:
        until(lambda: "master_link_status:up" in replica.ask("INFO replication"))
        wanted = "--store-replicas", "1", "--store-timeout-seconds", "3"
        server = serve("--models", str(repository), "--store", own_redis.url, *wanted)
        x = frames(3)
        with server.client() as client:
            session = create(client, "lstm")
            ys = [client.post(f"/sessions/{session}/step", json={"x": x[0], "position": 0}).json()["y"]]
            replica.stop(signal.SIGKILL)
            alone = client.post(f"/sessions/{session}/step", json={"x": x[1], "position": 1})
            assert (alone.status_code, "store-away" in alone.json()["type"]) == (503, True)
            replica.start()
            until(lambda: "master_link_status:up" in replica.ask("INFO replication"))
            for position in (1, 2):
                answer = client.post(f"/sessions/{session}/step", json={"x": x[position], "position": position})
                # The store itself had the write: the repetition finds it applied.
                assert answer.headers.get("idempotent-replay") == ("true" if position == 1 else None)
                ys.append(answer.json()["y"])
            body = {"model": "lstm", "sequences": [x], "outputs": "all"}
            assert ys == client.post("/predict", json=body).json()["outputs"][0]
    finally:
        replica.stop(signal.SIGKILL)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[RedisServer]]:
    nodes = []
    for number in range(3):
        (tmp_path / f"node{number}").mkdir()
        flags = "--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--cluster-node-timeout", "15000"
        nodes.append(RedisServer(tmp_path / f"node{number}", *flags))
    addresses = [f"127.0.0.1:{node.port}" for node in nodes]
    subprocess.run(
        ["redis-cli", "--cluster", "create", *addresses, "--cluster-yes"], check=True, capture_output=True, timeout=60
    )
    until(lambda: all("cluster_state:ok" in node.ask("CLUSTER INFO") for node in nodes))
    yield nodes
    for node in nodes:
        node.stop(signal.SIGKILL)


def test_sessions_live_in_a_cluster(repository: Path, serve: Serve, cluster: list[RedisServer]) -> None:
    flags = "--models", str(repository), "--store", f"redis+cluster://127.0.0.1:{cluster[0].port}"
    servers = [serve(*flags) for _ in range(2)]
    x = frames(6)
    with servers[0].client() as one, servers[1].client() as other:
        whole = one.post("/predict", json={"model": "lstm", "sequences": [x], "outputs": "all"}).json()["outputs"][0]
        sessions = [create(one, "lstm") for _ in range(20)]
        for session in sessions:
            ys = []
            for position, row in enumerate(x):
                at = (one, other)[position % 2]
                body = {"x": row, "position": position}
                ys.append(at.post(f"/sessions/{session}/step", json=body).json()["y"])
            assert ys == whole
            again = one.post(f"/sessions/{session}/step", json={"x": x[-1], "position": len(x) - 1})
            assert (again.headers["idempotent-replay"], again.json()["y"]) == ("true", whole[-1])
        listed = [one_["session"] for one_ in other.get("/sessions", params={"limit": 1000}).json()["sessions"]]
        assert sorted(listed) == sorted(sessions)
        fork = other.post(f"/sessions/{sessions[0]}/fork", json={}).json()
        assert fork["position"] == len(x)
        assert one.delete(f"/sessions/{sessions[0]}").status_code == 204
        assert other.get(f"/sessions/{sessions[0]}").status_code == 410
    slots = [int(node.ask("DBSIZE").removeprefix(":")) for node in cluster]
    assert min(slots) > 0  # on every node some
    assert [server.stop() for server in servers] == [0, 0]


def test_more_sessions_than_slots_live_in_the_store_and_a_full_store_refuses_or_evicts(
    repository: Path, serve: Serve, own_redis: RedisServer
) -> None:
    flags = "--models", str(repository), "--store", own_redis.url, "--max-sessions", "30"
    server = serve(*flags, "--arena-sessions", "4")
    x = frames(2)
    with server.client() as client:
        sessions = [create(client, "lstm") for _ in range(30)]
        first = [client.post(f"/sessions/{one}/step", json={"x": x[0], "position": 0}).json()["y"] for one in sessions]
        second = [client.post(f"/sessions/{one}/step", json={"x": x[1], "position": 1}).json()["y"] for one in sessions]
        whole = client.post("/predict", json={"model": "lstm", "sequences": [x], "outputs": "all"}).json()["outputs"][0]
        assert [first, second] == [[whole[0]] * 30, [whole[1]] * 30]
        full = client.post("/sessions", json={"model": "lstm"})
        assert (full.status_code, int(full.headers["retry-after"]) > 0) == (503, True)
    evicting = serve(*flags, "--when-full", "evict")
    with evicting.client() as client:
        create(client, "lstm")
        assert sum(client.get(f"/sessions/{one}").status_code == 410 for one in sessions) == 1


def test_idle_sessions_expire_in_the_store_and_are_answered_as_expired(
    repository: Path, serve: Serve, own_redis: RedisServer
) -> None:
    server = serve("--models", str(repository), "--store", own_redis.url, "--session-idle-seconds", "3")
    with server.client() as client:
        session = create(client, "lstm")
        client.post(f"/sessions/{session}/step", json={"x": frames(3)})
        until(lambda: client.get("/sessions").json()["sessions"] == [])
        gone = client.post(f"/sessions/{session}/step", json={"x": frames(1)})
        assert (gone.status_code, gone.json()["reason"], gone.json()["position"]) == (410, "expired", 3)


@pytest.mark.parametrize("kind", ["lmdb", pytest.param("redis", marks=pytest.mark.long)])
def test_workers_share_the_store_and_stop_with_status_0(
    repository: Path, serve: Serve, own_redis: RedisServer, tmp_path: Path, kind: str
) -> None:
    store = own_redis.url if kind == "redis" else f"lmdb:{tmp_path / 'store'}"
    server = serve("--models", str(repository), "--store", store, "--workers", "2")
    until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
    x = frames(30)
    session, ys = None, []
    for position, row in enumerate(x):
        with server.client() as client:  # a connection of its own, which either process may take
            session = session or create(client, "rnn")
            answer = client.post(f"/sessions/{session}/step", json={"x": row, "position": position})
            assert answer.status_code == 200, answer.text
            ys.append(answer.json()["y"])
    with server.client() as client:
        assert (
            ys
            == client.post("/predict", json={"model": "rnn", "sequences": [x], "outputs": "all"}).json()["outputs"][0]
        )
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


@pytest.mark.parametrize(
    ("flags", "status", "told"),
    [
        (("--workers", "2"), 2, "--store lmdb:FOLDER"),
        (("--store", "lmdb:/proc/store"), 1, "--store: /proc/store cannot be used"),
        (("--store", "postgres://x"), 1, "--store"),
    ],
)
def test_impossible_store_settings_are_refused_in_one_line(
    repository: Path, flags: tuple[str, ...], status: int, told: str
) -> None:
    done = run("serve", "--port", "0", "--models", str(repository), *flags)
    assert done.returncode == status
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
