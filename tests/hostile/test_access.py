"""Guessing keys, revoking them under load, and files that somebody else wrote, beside a well-behaved client."""

from __future__ import annotations

import hashlib
import http.client
import json
import secrets
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from cellserve.models.signature import MODEL_NAME
from tests.e2e.helpers import bearer
from tests.helpers import until
from tests.hostile.conftest import Beside
from tests.server import Server, start_server
from tests.versions import add_version, crashing

pytestmark = pytest.mark.long
WITHIN = 1.5  # seconds; the promise is one, and a busy machine is not the server's fault


class Guarded(NamedTuple):
    """A server that needs keys and watches its models."""

    server: Server
    models: Path
    keys: Path
    headers: dict[str, str]  # the well-behaved client's, whose key stays

    def add_key(self, owner: str) -> str:
        """A new key, which the server takes within a second."""
        key = secrets.token_urlsafe(8)
        with self.keys.open("a") as lines:
            lines.write(f"{owner}:{hashlib.sha256(key.encode()).hexdigest()}\n")
        time.sleep(1)
        return key


@pytest.fixture(scope="module")
def guarded(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    models, keys, key = folder / "models", folder / "keys", secrets.token_urlsafe(8)
    shutil.copytree(examples / "sunspots", models / "sunspots")
    keys.write_text(f"bob:{hashlib.sha256(key.encode()).hexdigest()}\n")
    server = start_server(
        "--models", str(models), "--api-keys-file", str(keys), "--trusted-proxies", "127.0.0.1",
        "--reload-seconds", "0.5",
        fresh=True,
    )  # fmt: skip
    yield Guarded(server, models, keys, bearer(key))
    assert server.stop() == 0


def statuses(server: Server, requests: list[tuple[str, str, bytes, dict[str, str]]]) -> list[int]:
    """The statuses of requests sent one after the other on one connection."""
    client = http.client.HTTPConnection(server.url.removeprefix("http://"))
    found = []
    for method, path, body, headers in requests:
        client.request(method, path, body, headers)
        answer = client.getresponse()
        answer.read()
        found.append(answer.status)
    client.close()
    return found


def test_guesses_of_keys_from_one_address_and_from_many(guarded: Guarded, beside: Beside) -> None:
    def guesses(addresses: list[str]) -> list[int]:
        return statuses(
            guarded.server,
            [("GET", "/models", b"", {**bearer(f"wrong {place}"), "X-Forwarded-For": address})
             for place, address in enumerate(addresses)],
        )  # fmt: skip

    with beside(guarded.server, "wrong keys", headers=guarded.headers) as seen:
        one = guesses(["10.0.0.1"] * 1000)
        assert one[:10] == [401] * 10
        assert one.count(429) > 900
        assert set(guesses([f"10.1.{place >> 8}.{place & 255}" for place in range(8000)])) == {401}
    assert seen.grown_bytes < 20e6


def test_a_key_in_a_trailer_opens_nothing(guarded: Guarded) -> None:
    keys, port = bearer(guarded.add_key("alice")), int(guarded.server.url.rpartition(":")[2])
    trailer = b"Authorization: " + next(iter(keys.values())).encode()
    with guarded.server.client(headers=keys) as client:
        session = client.post("/sessions", json={"model": "sunspots"}).json()["session"]
        for head in (guarded.headers, {}):
            lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
            body = b'{"x":[0.25]}'
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(
                    f"POST /sessions/{session}/step HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    f"{lines}Transfer-Encoding: chunked\r\n\r\n".encode()
                    + b"%x\r\n%b\r\n0\r\n%b\r\n\r\n" % (len(body), body, trailer)
                )
                answer = connection.recv(1000)
            assert answer.startswith(b"HTTP/1.1 404" if head else b"HTTP/1.1 401"), answer
        assert client.get(f"/sessions/{session}").json()["position"] == 0


def test_a_key_with_many_sockets_is_revoked(guarded: Guarded, beside: Beside) -> None:
    lines = guarded.keys.read_text()
    key = guarded.add_key("alice")
    url = guarded.server.url.replace("http", "ws") + "/stream"

    def ended(stream: ClientConnection) -> bool:
        try:
            while True:
                stream.recv(timeout=10)
        except ConnectionClosed as closed:
            return closed.rcvd is not None and closed.rcvd.code == 1008

    with (
        beside(guarded.server, "a revoked key with 100 sockets", headers=guarded.headers),
        ExitStack() as sockets,
    ):
        streams = [sockets.enter_context(connect(url, additional_headers=bearer(key))) for _ in range(100)]
        for stream in streams:
            stream.send(json.dumps({"op": "open", "model": "sunspots"}))
        guarded.keys.write_text(lines)
        revoked = time.monotonic()
        assert all(ended(stream) for stream in streams)
        assert time.monotonic() - revoked < WITHIN + 100 * 0.01  # closing handshakes, one after the other


def test_a_socket_that_does_not_read_ends_with_its_key(guarded: Guarded, beside: Beside) -> None:
    lines = guarded.keys.read_text()
    key = guarded.add_key("alice")
    url = guarded.server.url.replace("http", "ws") + "/stream"
    with (
        beside(guarded.server, "a revoked key whose socket is not read", headers=guarded.headers),
        connect(url, additional_headers=bearer(key), max_queue=1, ping_interval=None) as stream,
    ):
        stream.send(json.dumps({"op": "open", "model": "sunspots", "session": "s"}))
        stream.recv(timeout=10)
        stream.socket.settimeout(2)
        frame = json.dumps({"op": "step", "session": "s", "x": [[0.0]] * 1000, "outputs": "all"})
        with pytest.raises((TimeoutError, ConnectionClosed)):
            while True:  # until the server reads no more, since nobody reads its answers
                stream.send(frame)
        guarded.keys.write_text(lines)

        def is_broken() -> bool:
            try:
                stream.socket.send(b"\x89\x80\0\0\0\0")  # a ping, which the server does not read
            except TimeoutError:
                return False
            except OSError:
                return True
            return False

        until(is_broken, seconds=10)


def test_new_versions_that_crash_onnx_runtime_or_lead_elsewhere(guarded: Guarded, beside: Beside) -> None:
    home = guarded.models / "sunspots"
    with beside(guarded.server, "a version that crashes ONNX Runtime, links", headers=guarded.headers):
        add_version(guarded.models, "sunspots", 2, crashing(home / "1" / MODEL_NAME))
        shutil.copytree(home / "1", home / "3")
        (home / "3" / MODEL_NAME).unlink()
        (home / "3" / MODEL_NAME).symlink_to("/dev/zero")
        (home / "4").symlink_to("/proc/self/fd")
        client = http.client.HTTPConnection(guarded.server.url.removeprefix("http://"))

        def reasons() -> dict[int, str]:
            client.request("GET", "/models/sunspots", headers=guarded.headers)
            told = json.loads(client.getresponse().read())["versions"]
            return {one["version"]: one.get("reason", "") for one in told}

        found = until(reasons, lambda reasons: reasons.keys() == {1, 2, 3, 4} and bool(reasons[2]))
        assert "SIGFPE" in found[2] and "link" in found[3] and "link" in found[4] and not found[1]
        client.close()


def test_uploads_whose_headers_have_a_million_names_or_one_twice(guarded: Guarded, beside: Beside) -> None:
    def document(header: bytes) -> bytes:
        return struct.pack("<Q", len(header)) + header + bytes(4)

    tensor = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    empty = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    many = b"{" + b",".join(b'"%d":%b' % (number, empty) for number in range(250_000)) + b"}"
    twice = b'{"a":%b,"a":%b}' % (tensor, tensor)
    spaces = b'{"a":%b%b}' % (tensor, b" " * (15 << 20))
    headers = {**guarded.headers, "Content-Type": "application/x-safetensors"}
    with beside(guarded.server, "safetensors headers", headers=guarded.headers) as seen:
        for header in (many, twice, spaces):
            for method, path in (("POST", "/predict?model=sunspots"), ("PUT", "/sessions/uploaded/state")):
                make = ("PUT", "/sessions/uploaded", b'{"model":"sunspots"}',
                        {**guarded.headers, "Content-Type": "application/json"})  # fmt: skip
                [_, status] = statuses(guarded.server, [make, (method, path, document(header), headers)])
                assert status == 400
    assert seen.grown_bytes < 100e6
