"""Redis at fault behind real servers: damaged records, replies that do not fit, clocks that jump, TLS, Sentinels."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.e2e.helpers import create, frames, problem_kind
from tests.fork_server import run
from tests.helpers import free_port, until
from tests.redis_server import RedisServer
from tests.server import Serve, Server


def keys_of(session: str) -> tuple[str, str]:
    return f"cellserve:{{{session}}}:session", f"cellserve:{{{session}}}:fate"


def metric(client: httpx.Client, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.M)
    assert found, name
    return float(found[1])


def listed(client: httpx.Client) -> set[str]:
    return {one["session"] for one in client.get("/sessions").json()["sessions"]}


NEW_MARK = "1 0123456789abcdef"
DAMAGES = {
    "another type": ["DEL KEY", "SET KEY text"],
    "no position": ["HSET KEY mark none"],
    "a field less": ["HDEL KEY version", f"HSET KEY mark '{NEW_MARK}'"],
    "states too short": [f"HSET KEY states short mark '{NEW_MARK}'"],
    "states that are not finite": [f'HSET KEY states "NAN" mark "{NEW_MARK}"'],
    "an answer that is none": [f"HSET KEY last x mark '{NEW_MARK}'"],
}


def damage(redis: RedisServer, what: str, session: str) -> None:
    key = keys_of(session)[0]
    floats = int(redis.ask(f"HSTRLEN {key} states")[1:]) // 4
    for command in DAMAGES[what]:
        done = redis.ask(command.replace("KEY", key).replace("NAN", r"\x00\x00\xc0\x7f" * floats))
        assert not done.startswith("-"), done


@pytest.mark.parametrize("cached", [True, False], ids=["held here", "not held here"])
def test_a_damaged_record_is_one_sessions_error(
    repository: Path, serve: Serve, own_redis: RedisServer, cached: bool
) -> None:
    flags = "--models", str(repository), "--store", own_redis.url
    server = serve(*flags)
    x = frames(3)
    with server.client() as client:
        sound = create(client, "rnn")
        damaged = {what: create(client, "rnn") for what in DAMAGES}
        for session in (sound, *damaged.values()):
            assert client.post(f"/sessions/{session}/step", json={"x": x[0]}).status_code == 200
    if not cached:
        server = serve(*flags)
    for what, session in damaged.items():
        damage(own_redis, what, session)
    with server.client() as client:
        for what, session in damaged.items():
            for _ in range(2):
                answer = client.post(f"/sessions/{session}/step", json={"x": x[1]})
                assert (answer.status_code, problem_kind(answer)) == (500, "session-unreadable"), what
            assert client.get(f"/sessions/{session}/state").status_code == 500, what
            assert client.put(f"/sessions/{session}", json={"model": "rnn"}).status_code == 500, what
        assert client.post(f"/sessions/{sound}/step", json={"x": x[1]}).json()["position"] == 2
        # What a list shows of these two can be read: that their states cannot, it need not know.
        readable = {
            damaged[what] for what in ("states too short", "states that are not finite", "an answer that is none")
        }
        assert listed(client) == {sound} | readable
        assert metric(client, "cellserve_unreadable_records_total") >= 3 * len(damaged)
        for what, session in damaged.items():
            assert client.delete(f"/sessions/{session}").status_code == 204, what
            assert client.post(f"/sessions/{session}/step", json={"x": x[1]}).status_code == 410, what
        assert listed(client) == {sound}
        assert metric(client, 'cellserve_store_errors_total{reason="bad-reply"}') == 0
        assert metric(client, 'cellserve_store_errors_total{reason="other"}') == 0
    assert server.stop() == 0
    log = "".join(server.log)
    assert "Traceback" not in log
    assert log.count("that is not a session") <= len(DAMAGES) + 2
    assert not any(session in log for session in damaged.values())


class Mangler:
    """A proxy before a Redis that changes bytes of its next reply when a test says so."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.replaced: list[tuple[bytes, bytes]] = []  # what is replaced by what, once each
        self._ends: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for end in self._ends:
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._ends += client, server
                for pair in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_reply: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if is_reply and self.replaced and self.replaced[0][0] in data:
                    data = data.replace(*self.replaced.pop(0), 1)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("instead", [b"$7\r\nwritter\r\n", b":7\r\n", b"*2\r\n:1\r\n:2\r\n", b"!7\r\nwritten\r\n"])
def test_a_reply_that_does_not_fit_is_503_and_the_step_is_applied_once(
    repository: Path, serve: Serve, own_redis: RedisServer, instead: bytes
) -> None:
    mangler = Mangler(own_redis.port)
    server = serve("--models", str(repository), "--store", mangler.url)
    x = frames(3)
    with server.client() as client:
        session = create(client, "rnn")
        ys = [client.post(f"/sessions/{session}/step", json={"x": x[0], "position": 0}).json()["y"]]
        mangler.replaced.append((b"$7\r\nwritten\r\n", instead))
        lost = client.post(f"/sessions/{session}/step", json={"x": x[1], "position": 1})
        assert (lost.status_code, problem_kind(lost)) == (503, "store-away")
        again = client.post(f"/sessions/{session}/step", json={"x": x[1], "position": 1})
        assert (again.status_code, again.headers["idempotent-replay"]) == (200, "true")
        last = client.post(f"/sessions/{session}/step", json={"x": x[2], "position": 2})
        ys += [again.json()["y"], last.json()["y"]]
        body = {"model": "rnn", "sequences": [x], "outputs": "all"}
        assert ys == client.post("/predict", json=body).json()["outputs"][0]
    assert server.stop() == 0
    assert "(bad-reply)" in "".join(server.log)
    mangler.close()


def test_a_replicas_clock_that_is_two_hours_ahead_ends_no_session_and_lets_no_further_one_in(
    repository: Path, serve: Serve, own_redis: RedisServer, tmp_path: Path
) -> None:
    (tmp_path / "jump").mkdir()
    (tmp_path / "jump" / "sitecustomize.py").write_text(
        "import time\nbefore = time.time\ntime.time = lambda: before() + 7200 * (time.monotonic() > START)\n".replace(
            "START", "time_of_jump()"
        )
        + "import os\ndef time_of_jump():\n    return 0 if os.path.exists(os.environ['JUMPED']) else 1e18\n"
    )
    environment = {
        "PYTHONPATH": f"{tmp_path / 'jump'}:{os.environ.get('PYTHONPATH', '')}",
        "JUMPED": str(tmp_path / "jumped"),
    }
    flags = "--models", str(repository), "--store", own_redis.url, "--max-sessions", "10"
    one, other = serve(*flags), serve(*flags, environment=environment, fresh=True)
    with one.client() as at_one, other.client() as at_other:
        sessions = {create(at_one, "rnn") for _ in range(10)}
        (tmp_path / "jumped").touch()
        for client in (at_other, at_one):
            assert metric(client, "cellserve_sessions") == 10
            assert client.post("/sessions", json={"model": "rnn"}).status_code == 503
            assert listed(client) == sessions


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("CONFIG SET maxmemory 1", "out-of-memory"),
        ("REPLICAOF 127.0.0.1 1", "read-only"),
        ("CONFIG SET requirepass other", "wrong-password"),
        ("ACL SETUSER default -hset", "no-permission"),
    ],
)
def test_the_stores_error_is_reported_to_operators_as_what_it_is_and_to_clients_without_details(
    repository: Path, serve: Serve, own_redis: RedisServer, command: str, reason: str
) -> None:
    server = serve("--models", str(repository), "--store", own_redis.url)
    x = frames(3)
    with server.client() as client:
        session = create(client, "rnn")
        assert client.post(f"/sessions/{session}/step", json={"x": x[0], "position": 0}).status_code == 200
        assert own_redis.ask(f"{command}\r\nCLIENT KILL TYPE normal").startswith("+OK")
        answer = until(
            lambda: client.post(f"/sessions/{session}/step", json={"x": x[1], "position": 1}),
            lambda _: metric(client, f'cellserve_store_errors_total{{reason="{reason}"}}') > 0,
        )
        assert (answer.status_code, problem_kind(answer)) == (503, "store-away")
        assert not re.search(rf"127\.0\.0\.1|{own_redis.port}|maxmemory|password|replica", answer.text)
    assert server.stop() == 0
    assert f"the store fails ({reason})" in "".join(server.log)


def test_a_wrong_store_ends_the_start_with_one_line(repository: Path, own_redis: RedisServer) -> None:
    for store in (
        f"redis://:top:SECRET/x@127.0.0.1:{own_redis.port}",
        f"redis://someone:SECRET@127.0.0.1:{own_redis.port}/0",
    ):
        done = run("serve", "--port", "0", "--models", str(repository), "--store", store)
        assert done.returncode == 1
        assert done.stderr.startswith("cellserve serve: --store: ")
        assert done.stderr.count("\n") == 1
        assert "SECRET" not in done.stdout + done.stderr


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder with the certificate of an authority, and one of 127.0.0.1 that it has signed."""
    folder = tmp_path / "tls"
    folder.mkdir()
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    for line in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN=authority",
        "req -newkey rsa:2048 -nodes -keyout redis.key -out redis.csr -subj /CN=redis",
        "x509 -req -in redis.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out redis.crt -days 2 -extfile names",
    ):
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True)
    return folder


def test_a_store_speaks_tls_and_its_certificate_is_checked(
    repository: Path, serve: Serve, tmp_path: Path, certificates: Path
) -> None:
    port = free_port()
    files = [f"--tls-{what}-file {certificates / name}" for what, name in
             (("cert", "redis.crt"), ("key", "redis.key"), ("ca-cert", "ca.crt"))]  # fmt: skip
    flags = f"--tls-port {port} --tls-auth-clients no {' '.join(files)}"
    redis = RedisServer(tmp_path, *flags.split())
    url = f"rediss://127.0.0.1:{port}/0"
    try:
        done = run("serve", "--port", "0", "--models", str(repository), "--store", url)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "TLS fails" in done.stderr
        server = serve("--models", str(repository), "--store", f"{url}?ssl_ca_certs={certificates / 'ca.crt'}")
        with server.client() as client:
            session = create(client, "rnn")
            assert client.post(f"/sessions/{session}/step", json={"x": frames(1)[0]}).json()["durable"] == "store"
    finally:
        redis.stop()


@pytest.fixture
def sentinel(own_redis: RedisServer, tmp_path: Path) -> Iterator[tuple[int, RedisServer, RedisServer]]:
    """The port of a Sentinel, the primary that it watches, and a replica."""
    (tmp_path / "replica").mkdir()
    replica = RedisServer(tmp_path / "replica", "--replicaof", "127.0.0.1", str(own_redis.port))
    until(lambda: "master_link_status:up" in replica.ask("INFO replication"))
    port, config = free_port(), tmp_path / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nsentinel monitor main 127.0.0.1 {own_redis.port} 1\n"
        "sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 5000\n"
    )
    process = subprocess.Popen(["redis-server", str(config), "--sentinel"], stdout=subprocess.DEVNULL)
    yield port, own_redis, replica
    process.kill()
    process.wait()
    replica.stop(signal.SIGKILL)


def test_sentinels_name_the_primary_also_after_a_failover(
    repository: Path, serve: Serve, sentinel: tuple[int, RedisServer, RedisServer]
) -> None:
    port, primary, replica = sentinel
    until(lambda: f"slave0:ip=127.0.0.1,port={replica.port},state=online" in primary.ask("INFO replication"))
    server: Server = serve("--models", str(repository), "--store", f"redis+sentinel://127.0.0.1:{port}/main/0")
    x = frames(4)
    with server.client() as client:
        session = create(client, "lstm")
        for position in (0, 1):
            assert client.post(
                f"/sessions/{session}/step", json={"x": x[position], "position": position}
            ).status_code == 200  # fmt: skip
        until(lambda: replica.ask(f"EXISTS {keys_of(session)[0]}").startswith(":1"))
        with socket.create_connection(("127.0.0.1", port)) as connection:  # as if the primary were down
            until(lambda: b"num-slaves" in said(connection, b"SENTINEL MASTER main") and
                  str(replica.port).encode() in said(connection, b"SENTINEL REPLICAS main"))  # fmt: skip
            until(lambda: b"+OK" in said(connection, b"SENTINEL FAILOVER main"))
        until(lambda: "role:master" in replica.ask("INFO replication"))
        for position in (2, 3):
            body = {"x": x[position], "position": position}
            send = partial(client.post, f"/sessions/{session}/step", json=body)
            until(send, lambda one: one.status_code == 200)
        until(lambda: "role:slave" in primary.ask("INFO replication"))


def said(connection: socket.socket, command: bytes) -> bytes:
    connection.sendall(command + b"\r\n")
    return connection.recv(1 << 16)


@pytest.mark.long
def test_a_killed_parent_takes_its_workers_with_it_and_the_next_start_finds_the_port_free(
    repository: Path, serve: Serve, own_redis: RedisServer
) -> None:
    port = str(free_port())
    flags = "--models", str(repository), "--store", own_redis.url, "--workers", "2"
    first = serve(*flags, "--port", port)
    until(lambda: httpx.get(f"{first.url}/readyz").status_code == 200)
    children = Path(f"/proc/{first.process.pid}/task/{first.process.pid}/children").read_text().split()
    assert len(children) >= 2
    with first.client() as client:
        session = create(client, "rnn")
        client.post(f"/sessions/{session}/step", json={"x": frames(1)[0]})
        first.process.kill()  # the parent alone
        first.process.wait()
        until(lambda: not any(Path(f"/proc/{child}/cmdline").exists() for child in children))
    shared = set(Path("/dev/shm").glob("cellserve-workers-*"))
    second = serve(*flags, "--port", port)
    until(lambda: httpx.get(f"{second.url}/readyz").status_code == 200)
    with second.client() as client:
        assert client.get(f"/sessions/{session}").json()["position"] == 1
    own = set(Path("/dev/shm").glob("cellserve-workers-*")) - shared
    assert len(own) <= 1
    assert second.stop() == 0
    assert not own & set(Path("/dev/shm").glob("cellserve-workers-*"))
