"""Requests over HTTP however they are sent: the fast path and the ASGI endpoints give the same answers, in order."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.helpers import is_busy
from tests.helpers import FEATURES, until
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


def post(path: str, body: Any, *headers: str, version: str = "1.1") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    more = headers or ("Content-Type: application/json", f"Content-Length: {len(data)}")
    return "\r\n".join((f"POST {path} HTTP/{version}", "Host: test", *more, "", "")).encode() + data


def request(session: str, body: Any, *headers: str, version: str = "1.1") -> bytes:
    return post(f"/sessions/{session}/step", body, *headers, version=version)


def until_read(server: Server) -> None:
    """Returns when the server has read what was sent before: it has answered a later request."""
    with server.client() as client:
        client.get("/healthz")


def answers(connection: socket.socket, count: int) -> list[tuple[int, dict[str, Any]]]:
    """Reads so many answers: their statuses and documents."""
    return [(status, json.loads(body)) for status, body in raw_answers(connection, count)]


def raw_answers(connection: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """Reads so many answers: their statuses and bodies."""
    data = b""
    found: list[tuple[int, bytes]] = []
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
            found.append((int(data[9:12]), data[head + 4 : end]))
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


def test_requests_with_the_same_headers_are_told_apart_by_all_else(
    server: Server, connection: socket.socket, session: str
) -> None:
    again = request(session, STEP)
    for _ in range(3):
        connection.sendall(again)
        assert answers(connection, 1)[0][0] == 200
    other = {"x": [0.75] * FEATURES}
    assert len(json.dumps(other)) == len(json.dumps(STEP))
    connection.sendall(request(session, other))
    ((_, moved),) = answers(connection, 1)
    connection.sendall(again)
    ((_, back),) = answers(connection, 1)
    assert (moved["position"], back["position"]) == (4, 5)
    assert moved["y"] != back["y"]
    connection.sendall(request("unknown", STEP))
    assert answers(connection, 1)[0][0] == 404
    for place in (-5, again.index(b"\r\n\r\n") + 4):
        connection.sendall(again[:place])  # the rest comes later, with the next request
        until_read(server)
        connection.sendall(again[place:] + again)
        assert [status for status, _ in answers(connection, 2)] == [200, 200]
    connection.sendall(again[:-1] + b"!")  # ASGI's endpoint says what is wrong
    connection.sendall(again)
    assert [status for status, _ in answers(connection, 2)] == [400, 200]


def test_a_target_has_8_kib_at_most(server: Server, connection: socket.socket, session: str) -> None:
    connection.sendall(request("a" * 9000, STEP))
    assert answers(connection, 1)[0][0] == 414
    assert connection.recv(1) == b""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as another:
        for name, status in ((session, 200), ("a" * 9000, 414)):  # with the same headers
            another.sendall(request(name, STEP))
            assert answers(another, 1)[0][0] == status


def test_a_body_may_come_in_parts(server: Server, connection: socket.socket, session: str) -> None:
    for place in (1, 40, 120, 150):
        data = request(session, STEP)
        connection.sendall(data[:place])
        until_read(server)
        connection.sendall(data[place:])
        assert answers(connection, 1)[0][0] == 200
    chunked = [b"%x\r\n%b\r\n" % (len(part), part) for part in (b'{"x": ', json.dumps(STEP["x"]).encode(), b"}")]
    head = request(session, b"", "Content-Type: application/json", "Transfer-Encoding: chunked")
    connection.sendall(head + b"".join(chunked) + b"0\r\n\r\n")
    assert answers(connection, 1)[0][1]["position"] == 5


def test_a_body_of_many_time_steps_is_one_step(connection: socket.socket, session: str) -> None:
    for steps in (9000, 18000):  # with the same headers
        connection.sendall(request(session, {"x": [STEP["x"]] * 9000, "outputs": "last"}))
        status, document = answers(connection, 1)[0]
        assert (status, document["position"]) == (200, steps)
        connection.sendall(b"GET /models HTTP/1.1\r\nHost: test\r\n\r\n")
        assert answers(connection, 1)[0][0] == 200


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


PREDICTIONS = [
    {"model": "lstm", "sequences": [[STEP["x"]] * 7]},
    {"model": "lstm", "sequences": [[STEP["x"]] * 200], "outputs": "last", "return_states": True},
    {"model": "rnn", "sequences": [[STEP["x"]]], "outputs": "all", "return_states": True},
    {"model": "rnn", "sequences": [[STEP["x"]] * 3, [STEP["x"]] * 2]},
    {"model": "decaying", "sequences": [[STEP["x"]] * 3], "states": None},
    {"model": "lstm", "sequences": []},
    {"model": "lstm", "sequences": [[]]},
    {"model": "lstm", "sequences": [[[1e30] * FEATURES, ["x"] * FEATURES]]},
    {"model": "unknown", "sequences": [[STEP["x"]]]},
    {"model": "lstm", "sequences": [[STEP["x"]]], "more": 1},
    {"model": "lstm", "sequences": [[[0.5]]]},
]
STATUSES = [200] * 5 + [422] * 3 + [404] + [422] * 2  # of them


def test_predictions_are_the_same_bytes_on_the_fast_path_and_over_asgi(connection: socket.socket) -> None:
    headers = "Content-Type: application/json", "X-Request-Id: mine"  # an id takes the request to the ASGI endpoint
    over_asgi = []
    for body in PREDICTIONS:
        connection.sendall(post("/predict", body, *headers, f"Content-Length: {len(json.dumps(body))}"))
        over_asgi += raw_answers(connection, 1)
    connection.sendall(b"".join(post("/predict", body) for body in PREDICTIONS))  # without waiting for answers
    at_once = raw_answers(connection, len(PREDICTIONS))
    assert [status for status, _ in at_once] == STATUSES
    for (status, body), (status_over_asgi, body_over_asgi) in zip(at_once, over_asgi, strict=True):
        assert status == status_over_asgi
        assert re.sub(rb'"request_id":"[^"]*"', b"", body) == re.sub(rb'"request_id":"[^"]*"', b"", body_over_asgi)


def test_predictions_and_steps_on_one_connection_are_answered_in_order(connection: socket.socket, session: str) -> None:
    bodies = [PREDICTIONS[number % len(PREDICTIONS)] for number in range(40)]
    connection.sendall(b"".join(post("/predict", body) + request(session, STEP) for body in bodies))
    told = answers(connection, 80)
    assert [document.get("position") for _, document in told[1::2]] == list(range(1, 41))
    assert [status for status, _ in told[::2]] == [
        ([200] * 5 + [422] * 3 + [404] + [422] * 2)[n % 11] for n in range(40)
    ]


def test_clients_that_leave_without_their_prediction_leave_no_slot_in_use(server: Server) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    body = {"model": "lstm", "sequences": [[STEP["x"]] * 200]}
    for _ in range(50):
        with socket.create_connection((host, int(port)), timeout=20) as leaving:
            leaving.sendall(post("/predict", body) * 3)
    with server.client() as client:
        assert client.post("/predict", json=body).status_code == 200
        until(lambda: not is_busy(client))


def test_a_trailer_is_not_a_header(connection: socket.socket, session: str) -> None:
    body = b'{"model": "lstm", "sequences": [[[0.25, 0.25, 0.25, 0.25, 0.25]]]}'
    for path, data in ((f"/sessions/{session}/step", json.dumps(STEP).encode()), ("/predict", body)):
        head = post(path, b"", "Transfer-Encoding: chunked")  # without the type that a body must have
        chunks = b"%x\r\n%b\r\n0\r\nContent-Type: application/json\r\n\r\n" % (len(data), data)
        connection.sendall(head + chunks)
        assert answers(connection, 1)[0][0] == 415
