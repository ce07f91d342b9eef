"""`cellserve sessions` beside real servers and stores: a look into them, moves between them, and backups."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file

from cellserve.service.sessions.session import NO_LIMITS, Room
from cellserve.service.sessions.stores.records import SessionRecord, VersionStamp, new_revision
from cellserve.service.sessions.stores.redis_client import RedisClient
from cellserve.sessions import session_file
from cellserve.sessions.command import main
from tests.cellserve.test_session_file import same
from tests.e2e.helpers import bearer, create, frames
from tests.helpers import free_port, until
from tests.redis_server import RedisServer
from tests.server import Serve, Server

Run = Callable[..., Any]  # the fixture `run`: runs a command and returns the document that it printed


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, repository: Path) -> Run:
    monkeypatch.setenv("CELLSERVE_MODELS", str(repository))

    def run(*argv: object, status: int = 0) -> Any:
        capsys.readouterr()
        assert main([*map(str, argv), "--json"]) == status
        out, err = capsys.readouterr()
        assert bool(err) == bool(status), err
        return json.loads(out)

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that fails, and returns the one line that says why."""

    def refused(*argv: object) -> str:
        capsys.readouterr()
        assert main([*map(str, argv)]) == 1
        line = capsys.readouterr().err
        assert line.startswith("cellserve sessions: ")
        assert line.count("\n") == 1
        return line

    return refused


def stepped(client: httpx.Client, session: str, x: list[list[float]], position: int) -> httpx.Response:
    answer = client.post(f"/sessions/{session}/step", json={"x": x, "outputs": "all", "position": position})
    assert answer.status_code == 200, answer.text
    return answer


def whole(client: httpx.Client, model: str, x: list[list[float]]) -> list[list[float]]:
    """All outputs of one run over a whole sequence."""
    body = {"model": model, "sequences": [x], "outputs": "all"}
    return list(client.post("/predict", json=body).json()["outputs"][0])


def test_sessions_move_from_memory_to_lmdb_to_redis_with_every_bit(
    server: Server, serve: Serve, repository: Path, redis: RedisServer, tmp_path: Path, run: Run
) -> None:
    redis.flush()
    x, store, models = frames(12), f"lmdb:{tmp_path / 'store'}", ("--models", str(repository))
    with server.client() as client:
        kinds = {create(client, model): model for model in ("lstm", "rnn", "decaying")}
        for session in kinds:
            stepped(client, session, x[:5], 0)
        made = {session: client.get(f"/sessions/{session}").json()["created_at"] for session in kinds}
        whole_ys = {session: whole(client, model, x) for session, model in kinds.items()}
    first = run("export", "--all", "--url", server.url, "--to", tmp_path / "first")
    assert {one["session"] for one in first["exported"]} >= kinds.keys()
    files = [tmp_path / "first" / f"{session}.safetensors" for session in kinds]
    imported = run("import", *files, "--store", store)
    assert (set(imported["imported"]), imported["there"]) == (set(kinds), [])
    again = run("import", *files, "--store", store)
    assert (again["imported"], set(again["there"])) == ([], set(kinds))

    stopped = {one["session"]: one for one in run("list", "--store", store)["sessions"]}
    assert {name: (one["model"], one["position"]) for name, one in stopped.items()} == {
        name: (model, 5) for name, model in kinds.items()
    }
    running = serve(*models, "--store", store)
    with running.client() as client:
        for session in kinds:
            assert stepped(client, session, x[5:8], 5).json()["y"] == whole_ys[session][5:8]
        for session in kinds:
            inside, through = (run("show", session, *where) for where in (("--store", store), ("--url", running.url)))
            assert inside["states"] == through["states"]
            assert inside["created_at"] == through["created_at"] == made[session]
            assert (inside["position"], inside["durable"], through["durable"]) == (8, "process", "process")
            assert inside["last_change"] == {"position": 5, "position_after": 8}
            state = client.get(f"/sessions/{session}/state").content
            (tmp_path / "state").write_bytes(state)
            for name, tensor in load_file(tmp_path / "state").items():
                told = inside["states"][name]
                assert (told["dtype"], told["shape"]) == (str(tensor.dtype), list(tensor.shape))
                assert (told["min"], told["max"]) == (tensor.min().item(), tensor.max().item())
        seen = [run("list", *where)["sessions"] for where in (("--store", store), ("--url", running.url))]
        assert [{one["session"]: one["position"] for one in each} for each in seen] == [dict.fromkeys(kinds, 8)] * 2
        assert [{one["session"]: one["created_at"] for one in each} for each in seen] == [made] * 2
    assert running.stop() == 0

    run("export", *kinds, "--store", store, "--to", tmp_path / "second")
    imported = run("import", tmp_path / "second", "--store", redis.url)
    assert set(imported["imported"]) == kinds.keys()
    run("export", "--all", "--store", redis.url, "--to", tmp_path / "third")
    for session in kinds:
        files = [tmp_path / folder / f"{session}.safetensors" for folder in ("first", "second", "third")]
        first_file, second, third = map(session_file.read, files)
        assert same(second, third)
        assert (first_file.last, first_file.position, second.position) == (None, 5, 8)  # the API does not tell it
        assert second.last is not None
    with serve(*models, "--store", redis.url).client() as client:
        for session in kinds:
            again = stepped(client, session, x[5:8], 5)
            assert (again.headers["idempotent-replay"], again.json()["y"]) == ("true", whole_ys[session][5:8])
            assert client.get(f"/sessions/{session}").json()["created_at"] == made[session]
            assert stepped(client, session, x[8:], 8).json()["y"] == whole_ys[session][8:]
        assert {one["position"] for one in run("list", "--store", redis.url)["sessions"]} == {12}


def test_sessions_of_owners_are_reached_with_their_keys_and_keep_their_owners_in_stores(
    serve: Serve, repository: Path, keys: tuple[Path, str, str], tmp_path: Path, run: Run, refused: Callable[..., str]
) -> None:
    file, alice, bob = keys
    store = f"lmdb:{tmp_path / 'store'}"
    server = serve("--models", str(repository), "--api-keys-file", str(file), "--store", store)
    at = "--url", server.url
    for owner, key in (("alice", alice), ("bob", bob)):
        (tmp_path / owner).write_text(f"{key}\n")
        with server.client(headers=bearer(key)) as client:
            client.put("/sessions/same", json={"model": "rnn"})
            stepped(client, "same", frames(3, len(owner)), 0)
    assert "--key-file" in refused("list", *at)
    with_key = *at, "--key-file", tmp_path / "alice"
    assert [one["session"] for one in run("list", *with_key)["sessions"]] == ["same"]
    assert {one["session"] for one in run("list", "--store", store)["sessions"]} == {"alice/same", "bob/same"}
    assert run("show", "same", *with_key)["owner"] is None
    assert "there is no session 'same'" in refused("show", "same", "--store", store)
    assert run("show", "bob/same", "--store", store)["owner"] == "bob"

    run("export", "same", *with_key, "--to", tmp_path / "same.safetensors")
    other = f"lmdb:{tmp_path / 'other'}"
    assert "does not say whose it is" in refused("import", tmp_path / "same.safetensors", "--store", other)
    run("import", tmp_path / "same.safetensors", "--store", other, "--owner", "alice")
    shown = run("show", "alice/same", "--store", other)
    assert (shown["states"], shown["position"]) == (run("show", "alice/same", "--store", store)["states"], 3)

    # Into a server they come as its API takes them: of the key's owner, at position 1.
    run("export", "bob/same", "--store", store, "--to", tmp_path / "of-bob.safetensors")
    assert "exists already, with another state" in refused("import", tmp_path / "of-bob.safetensors", *with_key)
    run("import", tmp_path / "of-bob.safetensors", *with_key, "--replace")
    assert run("show", "same", *with_key)["states"] == run("show", "bob/same", "--store", store)["states"]
    with server.client(headers=bearer(alice)) as client:
        client.delete("/sessions/same")
    assert "was deleted at position 4" in refused("show", "same", *with_key)
    assert "has ended at position 4 (deleted)" in refused("show", "alice/same", "--store", store)
    with server.client(headers=bearer(bob)) as client:
        client.delete("/sessions/same")


@pytest.fixture
def busy(serve: Serve, repository: Path, tmp_path: Path) -> Iterator[tuple[Path, list[tuple[str, list[int]]]]]:
    """A server with two workers, and its sessions with the positions that their clients know of."""
    server = serve("--models", str(repository), "--store", f"lmdb:{tmp_path / 'store'}", "--workers", "2")
    x, over, sessions = frames(4000), threading.Event(), []

    def step(session: str, known: list[int]) -> None:
        with server.client() as client:
            while not over.is_set():
                stepped(client, session, [x[known[0]]], known[0])
                known[0] += 1

    with server.client() as client:
        until(lambda: client.get("/readyz").status_code == 200)
        sessions = [(create(client, "decaying"), [0]) for _ in range(20)]
    threads = [threading.Thread(target=step, args=one) for one in sessions]
    for thread in threads:
        thread.start()
    yield tmp_path / "store", sessions
    over.set()
    for thread in threads:
        thread.join()
    assert server.stop() == 0


@pytest.mark.long
def test_a_backup_while_clients_step_is_served_as_it_was(
    busy: tuple[Path, list[tuple[str, list[int]]]], serve: Serve, repository: Path, tmp_path: Path, run: Run
) -> None:
    store, sessions = busy
    backup, restored = tmp_path / "backup", tmp_path / "restored"
    while min(known[0] for _, known in sessions) < 5:
        threading.Event().wait(0.05)
    before = {session: known[0] for session, known in sessions}
    told = run("backup", backup, "--store", f"lmdb:{store}")
    after = {session: known[0] + 1 for session, known in sessions}  # its answer may be under way
    assert (told["sessions"], told["shards"], told["one_moment"]) == (20, 2, True)
    run("restore", backup, "--store", f"lmdb:{restored}")
    x = frames(4000)
    with serve("--models", str(repository), "--store", f"lmdb:{restored}").client() as client:
        for session, _ in sessions:
            position = client.get(f"/sessions/{session}").json()["position"]
            assert before[session] <= position <= after[session]
            y = stepped(client, session, [x[position]], position).json()["y"]
            assert y == whole(client, "decaying", x[: position + 1])[-1:]


def test_a_redis_of_many_sessions_is_listed_whole_without_extending_their_lives(
    redis: RedisServer, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    redis.flush()
    monkeypatch.setattr("cellserve.service.sessions.stores.redis_reader._PAGE", 7)
    names = [f"{owner}{number}" for owner in ("", "alice/") for number in range(20)]

    async def fill() -> None:
        client = RedisClient(redis.url, 100, 100, 10, 0)
        room = Room(10**6, "alice", NO_LIMITS)
        for name in names:
            stamp = VersionStamp(3, new_revision())
            await client.create(name, SessionRecord("rnn", 1, "0" * 64, b"", stamp, b"state"), room)
        await client.close()

    asyncio.run(fill())
    redis.ask("SET cellserve:{broken}:session x")
    redis.ask("ZADD cellserve:sessions 99999999999 broken")
    redis.ask("PEXPIRE cellserve:{7}:session 50000")
    found = run("list", "--limit", "0", "--store", redis.url)["sessions"]
    assert sorted(one["session"] for one in found) == sorted([*names, "broken"])
    told = {one["session"]: one for one in found}
    assert told["broken"] == {"session": "broken", "unreadable": "it is not a hash"}
    assert 0 < told["7"]["expires_in"] < 50
    assert 50 < told["8"]["expires_in"] <= 110
    assert run("list", "--limit", "10", "--store", redis.url)["more"]
    assert main(["list", "--limit", "0", "--store", redis.url]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["session", "model", "version", "position", "age", "expires", "in"]
    assert len(table) == len(names) + 2


def test_what_cannot_be_done_is_reported_in_one_line(
    server: Server, redis: RedisServer, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "store.json").write_text('{"format": 3, "shards": 1}')
    (tmp_path / "key").write_text("two keys")
    (tmp_path / "empty").mkdir()
    nobody = f"http://127.0.0.1:{free_port()}"
    not_http, to = f"http://127.0.0.1:{redis.port}", ("--to", tmp_path / "to")
    for argv, reason in (
        (("list", "--url", nobody), "no answer from http"),
        (("list", "--url", not_http), "no answer from http"),
        (("list", "--url", f"{server.url}/docs"), "see /docs"),
        (("list", "--url", "nowhere"), "is not the URL of a server"),
        (("list", "--store", "memory"), "give its --url"),
        (("list", "--store", "postgres://x"), "lmdb:FOLDER"),
        (("list", "--store", "lmdb:"), "the folder is missing"),
        (("list", "--store", f"lmdb:{tmp_path}"), "no store of sessions"),
        (("list", "--store", f"lmdb:{newer}"), "of a newer Cellserve"),
        (("import", "x", "--store", f"lmdb:{newer}"), "x: No such file"),
        (("list", "--store", "redis://:secret@127.0.0.1:1"), "cannot be reached"),
        (("show", "none", "--url", server.url), "none: there is no session of that id"),
        (("show", "none", "--store", redis.url), "there is no session 'none' in redis://"),
        (("list", "--url", server.url, "--key-file", tmp_path / "key"), "must hold one key"),
        (("list", "--url", server.url, "--key-file", tmp_path / "none"), "No such file"),
        (("export", "a", "b", "--url", server.url, "--to", "x.safetensors"), "name of one file"),
        (("import", tmp_path / "empty", "--url", server.url), "no exported sessions"),
        (("backup", tmp_path / "to", "--store", redis.url), "--store lmdb:FOLDER"),
        (("backup", tmp_path / "to"), "CELLSERVE_STORE"),
        (("backup", newer, "--store", f"lmdb:{tmp_path}"), "is not empty"),
    ):
        line = refused(*argv)
        assert reason in line, line
        assert "secret" not in line
    monkeypatch.setenv("CELLSERVE_PORT", nobody.rpartition(":")[2])
    assert f"no answer from {nobody}" in refused("list")
    monkeypatch.setenv("CELLSERVE_STORE", redis.url)
    assert "there is no session 'none' in redis://" in refused("show", "none")
    assert not (tmp_path / "to").exists()
    with pytest.raises(SystemExit) as error:
        main(["export", *map(str, to)])
    assert error.value.code == 2
