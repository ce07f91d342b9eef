"""Steps over HTTP however they are sent: the short way and the long one give the same answers, in order."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import FEATURES
from tests.server import Server

STEP = {"x": [0.25] * FEATURES}


@pytest.fixture
def connection(server: Server) -> Iterator[socket.socket]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        yield connection


@pytest.fixture
def session(server: Server) -> str:
    with server.client() as client:
        return str(client.post("/sessions", json={"model": "lstm"}).json()["session"])


def request(session: str, body: Any, *headers: str, version: str = "1.1") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    more = headers or ("Content-Type: application/json", f"Content-Length: {len(data)}")
    return "\r\n".join((f"POST /sessions/{session}/step HTTP/{version}", "Host: test", *more, "", "")).encode() + data


def answers(connection: socket.socket, count: int) -> list[tuple[int, dict[str, Any]]]:
    """Reads so many answers: their statuses and documents."""
    data = b""
    found: list[tuple[int, dict[str, Any]]] = []
    while len(found) < count:
        part = connection.recv(65536)
        assert part, data
        data += part
        while (head := data.find(b"\r\n\r\n")) >= 0:
            length = re.search(rb"content-length: (\d+)", data[:head])
            assert length and b"\r\ndate: " in data[:head]
            end = head + 4 + int(length[1])
            if len(data) < end:
                break
            found.append((int(data[9:12]), json.loads(data[head + 4 : end])))
            data = data[end:]
    assert not data
    return found


def test_requests_that_follow_without_waiting_are_answered_in_order(connection: socket.socket, session: str) -> None:
    requests = [request(session, STEP) for _ in range(20)]
    requests[7] = request("unknown", STEP)
    requests[11] = request(session, {"x": "no"})
    requests[13] = request(session, {"x": [STEP["x"]] * 3})
    connection.sendall(b"".join(requests))
    told = answers(connection, 20)
    assert [status for status, _ in told] == [200] * 7 + [404] + [200] * 3 + [422] + [200] * 8
    positions = [document["position"] for status, document in told if status == 200]
    assert positions == [*range(1, 11), 11, 14, *range(15, 21)]


def test_a_body_may_come_in_parts(connection: socket.socket, session: str) -> None:
    for place in (1, 40, 120, 150):
        data = request(session, STEP)
        connection.sendall(data[:place])
        time.sleep(0.05)
        connection.sendall(data[place:])
        assert answers(connection, 1)[0][0] == 200
    chunked = [b"%x\r\n%b\r\n" % (len(part), part) for part in (b'{"x": ', json.dumps(STEP["x"]).encode(), b"}")]
    head = request(session, b"", "Content-Type: application/json", "Transfer-Encoding: chunked")
    connection.sendall(head + b"".join(chunked) + b"0\r\n\r\n")
    assert answers(connection, 1)[0][1]["position"] == 5


def test_a_body_of_many_time_steps_is_one_step(connection: socket.socket, session: str) -> None:
    connection.sendall(request(session, {"x": [STEP["x"]] * 9000, "outputs": "last"}))
    status, document = answers(connection, 1)[0]
    assert (status, document["position"]) == (200, 9000)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_connection_is_closed_where_that_was_asked_for(connection: socket.socket, session: str, version: str) -> None:
    body = json.dumps(STEP).encode()
    headers = "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close"
    connection.sendall(request(session, body, *headers, version=version))
    assert answers(connection, 1)[0][0] == 200
    assert connection.recv(1) == b""


def test_what_json_must_say_of_itself_may_have_parameters(connection: socket.socket, session: str) -> None:
    body = json.dumps(STEP).encode()
    for kind, status in (("application/json; charset=utf-8", 200), ("text/plain", 415)):
        connection.sendall(request(session, body, f"Content-Type: {kind}", f"Content-Length: {len(body)}"))
        assert answers(connection, 1)[0][0] == status


def test_clients_that_leave_without_their_answer_disturb_nobody(server: Server, session: str) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    for _ in range(50):
        with socket.create_connection((host, int(port)), timeout=20) as leaving:
            leaving.sendall(request(session, STEP))
    with server.client() as client:
        position = client.post(f"/sessions/{session}/step", json=STEP).json()["position"]
        assert 1 <= position <= 51
        assert client.post(f"/sessions/{session}/step", json=STEP).json()["position"] == position + 1
