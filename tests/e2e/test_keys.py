"""Who may: keys, owners, origins; and nothing of them in the log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from tests.e2e.helpers import bearer, new_key
from tests.fork_server import run
from tests.helpers import FEATURES, until
from tests.server import Serve

STEP = {"x": [0.125] * FEATURES}


def test_a_key_opens_only_its_owners_sessions(repository: Path, serve: Serve, keys: tuple[Path, str, str]) -> None:
    file, alice, bob = keys
    assert alice not in file.read_text()
    server = serve("--models", str(repository), "--api-keys-file", str(file), "--trusted-proxies", "127.0.0.1")
    with server.client() as client:
        for number, (method, path) in enumerate((
            ("POST", "/sessions"), ("GET", "/sessions"), ("PUT", "/sessions/x"), ("GET", "/sessions/x"),
            ("POST", "/sessions/x/step"), ("POST", "/sessions/x/reset"), ("POST", "/sessions/x/fork"),
            ("POST", "/sessions/x/rollout"),
            ("GET", "/sessions/x/state"), ("PUT", "/sessions/x/state"), ("DELETE", "/sessions/x"),
            ("POST", "/predict"), ("GET", "/models"), ("GET", "/models/lstm"),
        )):  # fmt: skip
            elsewhere = {"x-forwarded-for": f"10.0.0.{number}"}  # each address may send few wrong keys
            for headers in ({}, bearer("wrong") | elsewhere, {"authorization": f"Basic {alice}"}):
                answer = client.request(method, path, headers=headers)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
        assert [client.get(path).status_code for path in ("/healthz", "/readyz", "/openapi.json")] == [200] * 3
        # Ids belong to their owner: two owners may choose the same.
        for key in (alice, bob):
            assert client.put("/sessions/same", json={"model": "lstm"}, headers=bearer(key)).status_code == 201
        mine = client.post("/sessions", json={"model": "lstm"}, headers=bearer(alice)).json()["session"]
        stepped = client.post(f"/sessions/{mine}/step", json=STEP, headers=bearer(alice)).json()
        assert stepped["position"] == 1
        for method, path in (("GET", ""), ("POST", "/step"), ("POST", "/reset"), ("GET", "/state"), ("DELETE", "")):
            body = STEP if path == "/step" else None
            answer = client.request(method, f"/sessions/{mine}{path}", headers=bearer(bob), json=body)
            assert answer.status_code == 404
        listed = client.get("/sessions", headers=bearer(bob)).json()["sessions"]
        assert [told["session"] for told in listed] == ["same"]
        # A new key of the same owner opens what the old one made, and an old one ends, without a restart.
        other = new_key("alice", file)
        lines = file.read_text().splitlines()
        file.write_text("# rotated\n" + "\n".join(lines[1:]) + "\n")
        until(lambda: client.get(f"/sessions/{mine}", headers=bearer(other)).status_code == 200)
        until(lambda: client.get(f"/sessions/{mine}", headers=bearer(alice)).status_code == 401)
    server.stop()
    log = "".join(server.log)
    assert alice not in log and bob not in log and "0.125" not in log


def test_a_socket_sends_its_key_in_a_header_or_in_the_first_frame(
    repository: Path, serve: Serve, keys: tuple[Path, str, str]
) -> None:
    file, alice, bob = keys
    server = serve("--models", str(repository), "--api-keys-file", str(file))
    url = server.url.replace("http", "ws") + "/stream"
    with connect(url, additional_headers=bearer(alice)) as stream:
        stream.send('{"op": "open", "model": "lstm", "session": "s"}')
        assert json.loads(stream.recv())["session"] == "s"
        for key, told in ((alice, {"op": "auth", "ref": 2}), (bob, 422), ("wrong", 401)):
            stream.send(json.dumps({"op": "auth", "key": key, "ref": 2}))
            answer = json.loads(stream.recv())
            assert (answer["problem"]["status"] if "problem" in answer else answer) == told
    with connect(url) as stream:
        stream.send(json.dumps({"op": "auth", "key": alice, "ref": 1}))
        assert json.loads(stream.recv()) == {"op": "auth", "ref": 1}
        stream.send('{"op": "attach", "session": "s"}')
        assert json.loads(stream.recv())["position"] == 0
    with connect(url, additional_headers=bearer(bob)) as stream:
        stream.send('{"op": "attach", "session": "s"}')
        assert json.loads(stream.recv())["problem"]["status"] == 404
    for first in (json.dumps({"op": "auth", "key": "wrong"}), '{"op": "open", "model": "lstm"}', b"\0"):
        with connect(url) as stream:
            stream.send(first)
            assert json.loads(stream.recv())["problem"]["status"] == 401
            with pytest.raises(ConnectionClosed) as closed:
                stream.recv()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
    with pytest.raises(InvalidStatus) as refused, connect(url, additional_headers=bearer("wrong")):
        pass
    assert refused.value.response.status_code == 401


def test_pages_of_other_origins_open_no_sockets(repository: Path, serve: Serve) -> None:
    server = serve("--models", str(repository), "--allowed-origins", "https://good.example, https://fine.example")
    url = server.url.replace("http", "ws") + "/stream"
    for origin in (server.url, "https://good.example", "https://fine.example"):
        with connect(url, origin=Origin(origin)) as stream:
            stream.send('{"op": "open", "model": "lstm"}')
            assert json.loads(stream.recv())["op"] == "open"
    with pytest.raises(InvalidStatus) as refused, connect(url, origin=Origin("https://evil.example")):
        pass
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize("content", ["alice", "alice:123", "ali ce:" + "0" * 64, None])
def test_a_server_does_not_start_with_an_invalid_key_file(
    repository: Path, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    done = run("serve", "--models", str(repository), "--api-keys-file", str(file))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("cellserve serve: ")
    assert "Traceback" not in done.stderr


def test_a_failing_key_command_says_why_in_one_line(tmp_path: Path) -> None:
    bad = run("key", "a b", "--file", str(tmp_path / "k"))
    assert bad.returncode == 2
    nowhere = run("key", "a", "--file", str(tmp_path / "no" / "k"))
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (1, 1)
