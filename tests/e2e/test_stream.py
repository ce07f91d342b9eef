"""`WS /stream` over a real socket, as docs/reference/protocol.md has it: JSON, binary frames, errors, back-pressure."""

from __future__ import annotations

import json
import socket
import struct

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.e2e.helpers import answered, ask, binary, create, frames, whole_sequence
from tests.helpers import FEATURES
from tests.server import Server


def test_a_session_is_opened_stepped_and_closed(server: Server, stream: ClientConnection) -> None:
    x = frames(5)
    opened = ask(stream, op="open", model="lstm", ref="a")
    assert (opened["op"], opened["ref"], opened["handle"], opened["position"]) == ("open", "a", 0, 0)
    first = ask(stream, op="step", session=0, x=x[0], ref={"any": ["thing"]})
    assert first == {
        "op": "step",
        "ref": {"any": ["thing"]},
        "session": opened["session"],
        "position": 1,
        "y": first["y"],
        "durable": "none",
    }
    rest = ask(stream, op="step", session=opened["session"], x=x[1:], outputs="all")
    assert [first["y"], *rest["y"]] == whole_sequence(server, "lstm", x)
    assert rest["position"] == 5
    assert ask(stream, op="close", session=0)["session"] == opened["session"]
    gone = ask(stream, op="step", session=0, x=x[0], ref=9)
    assert (gone["op"], gone["ref"], gone["problem"]["status"]) == ("error", 9, 410)


def test_an_attached_session_outlives_the_socket(server: Server) -> None:
    x = frames(4)
    with server.client() as client:
        session = create(client, "rnn")
        ys = [client.post(f"/sessions/{session}/step", json={"x": x[0]}).json()["y"]]
        for row in x[1:3]:
            with connect(server.url.replace("http", "ws") + "/stream") as socket:
                attached = ask(socket, op="attach", session=session)
                assert attached["position"] == len(ys)
                ys.append(ask(socket, op="step", session=attached["handle"], x=row)["y"])
        ys.append(client.post(f"/sessions/{session}/step", json={"x": x[3]}).json()["y"])
    assert ys == whole_sequence(server, "rnn", x)


def test_a_key_that_is_not_required_is_ignored(stream: ClientConnection) -> None:
    stream.send('{"op": "auth", "key": "of another server", "ref": 1}')
    assert json.loads(stream.recv(timeout=30)) == {"op": "auth", "ref": 1}


@pytest.mark.parametrize(
    ("frame", "status", "told"),
    [
        ("{", 400, "JSON"),
        ('{"op": "fly"}', 422, 'op: \'fly\' is not one of its values: send one of "auth", "open", "attach"'),
        ('{"op": "fly", "x": ' + "[" * 100_000, 422, "op: 'fly' is not one of its values"),
        ('{"op": "step", "y": "\\ud800", "session": 0}', 422, "y: unknown field"),
        ('{"ref": 1}', 422, 'op: missing: send one of "auth", "open", "attach"'),
        ('{"op": "step", "x": [1]}', 422, "session: missing: send op, session, x, and optionally ref, outputs"),
        ('{"op": "close", "session": 0, "x": [1]}', 422, "x: unknown field: send op, session, and optionally"),
        ('{"op": "step", "session": 0, "x": [1], "outputs": "some"}', 422, 'send "all" or "last"'),
        ('{"op": "auth", "kay": "k"}', 422, "kay: unknown field: send op, key"),
        ('{"op": "step", "session": 7, "x": [1]}', 404, "no handle 7"),
        ('{"op": "step", "session": -1, "x": [1]}', 404, "no handle -1"),
        ('{"op": "step", "session": 0, "x": [1, 2], "ref": 3}', 422, "x: 2 numbers where the model takes 5"),
        ('{"op": "step", "session": 0, "x": [1, 2, 3, 4, 1e39]}', 422, "x[4]: not a finite number"),
        ('{"op": "step", "session": 0, "x": [1, 2, "3", 4, 5]}', 422, "x[2]: expected a number"),
        ('{"op": "open", "model": "nobody"}', 404, "nobody"),
        ('{"op": "attach", "session": "nobody"}', 404, "no session"),
        (b"", 422, "0 bytes"),
        (struct.pack("<4I", 9, 5, 1, 1) + bytes(24), 422, "kind: 9"),
        (struct.pack("<4I", 1, 5, 0, 1), 422, "0 sessions"),
        (struct.pack("<4I", 1, 5, 4_000_000_000, 4_000_000_000), 422, "alone need 16000000016"),
        (struct.pack("<5I", 1, 5, 1, 0x80000000, 0), 422, "makes it"),
        (binary([0, 0], np.zeros((2, 1, FEATURES))), 422, "twice"),
        (binary([0, 1], np.zeros((2, 1, FEATURES))), 422, "several models"),
        (binary([3], np.zeros((1, 1, FEATURES))), 404, "no handle 3"),
        (binary([0], np.zeros((1, 2, FEATURES)))[:-1], 422, "makes it 60"),
        (binary([0], np.array([[[0, 0, np.nan, 0, 0]]])), 422, "x[0][0][2]: not a finite number"),
    ],
    ids=range(26),
)
def test_a_bad_frame_is_answered_and_the_socket_stays_open(
    server: Server, stream: ClientConnection, frame: str | bytes, status: int, told: str
) -> None:
    ask(stream, op="open", model="lstm")
    ask(stream, op="open", model="rnn")
    stream.send(frame)
    error = json.loads(stream.recv(timeout=30))
    assert error["op"] == "error"
    assert error["problem"]["status"] == status
    assert told in error["problem"]["detail"]
    if isinstance(frame, bytes) and frame:
        assert error["ref"] == 5
    step = ask(stream, op="step", session=0, x=frames(1)[0])
    assert (step["position"], [step["y"]]) == (1, whole_sequence(server, "lstm", frames(1)))


def test_binary_frames_step_many_sessions_at_once_bit_for_bit(server: Server, stream: ClientConnection) -> None:
    count = 300  # more than one tick takes
    x = np.random.default_rng(3).normal(size=(count, 9, FEATURES)).astype(np.float32)
    for _ in range(count):
        ask(stream, op="open", model="lstm")
    ys, done = [], 0
    for steps in (1, 5, 3):
        order = np.random.default_rng(done).permutation(count)
        stream.send(binary(order.tolist(), x[order, done : done + steps]))
        ref, positions, statuses, y = answered(stream.recv(timeout=30))
        done += steps
        assert (ref, set(positions), set(statuses)) == (5, {done}, {0})
        ys.append(y[np.argsort(order)])
    stepped = np.concatenate(ys, axis=1)
    with server.client() as client:
        body = {"model": "lstm", "sequences": x.tolist(), "outputs": "all"}
        expected = np.array(client.post("/predict", json=body).json()["outputs"], np.float32)
    assert stepped.tobytes() == expected.tobytes()


def test_in_a_binary_frame_an_error_concerns_its_own_session(server: Server, stream: ClientConnection) -> None:
    sessions = [ask(stream, op="open", model="rnn")["session"] for _ in range(3)]
    with server.client() as client:
        client.delete(f"/sessions/{sessions[1]}")
    x = np.random.default_rng(0).normal(size=(3, 2, FEATURES)).astype(np.float32)
    stream.send(binary([0, 1, 2], x))
    error = json.loads(stream.recv(timeout=30))
    assert (error["ref"], error["row"], error["session"]) == (5, 1, sessions[1])
    assert error["problem"]["status"] == 410
    _, positions, statuses, y = answered(stream.recv(timeout=30))
    assert statuses == [0, 410, 0]
    assert (positions[0], positions[2]) == (2, 2)
    for row in (0, 2):
        assert y[row].tolist() == np.array(whole_sequence(server, "rnn", x[row].tolist()), np.float32).tolist()


def test_frames_sent_ahead_are_applied_in_order(server: Server, stream: ClientConnection) -> None:
    x = frames(500)
    ask(stream, op="open", model="decaying")
    for number, row in enumerate(x):
        stream.send(json.dumps({"op": "step", "session": 0, "x": row, "ref": number}))
    answers = [json.loads(stream.recv(timeout=30)) for _ in x]
    assert [answer["ref"] for answer in answers] == list(range(500))
    assert [answer["position"] for answer in answers] == list(range(1, 501))
    assert [answer["y"] for answer in answers] == whole_sequence(server, "decaying", x)


def test_a_short_frame_never_overtakes_a_long_one(server: Server, stream: ClientConnection) -> None:
    x = frames(300)
    ask(stream, op="open", model="decaying")
    sent, done = [], 0
    for number in range(60):
        size = (1, 7, 1, 1, 2)[number % 5]
        part = x[done : done + size]
        if number % 7 == 3:
            stream.send(binary([0], np.array([part], np.float32)))
        else:
            stream.send(json.dumps({"op": "step", "session": 0, "x": part if size > 1 else part[0], "outputs": "all"}))
        done += size
        sent.append(done)
    got: dict[int, list[list[float]]] = {}
    for _ in sent:
        message = stream.recv(timeout=30)
        if isinstance(message, bytes):
            _, (position,), _, y = answered(message)
            got[position] = y[0].tolist()
        else:
            told = json.loads(message)
            got[told["position"]] = told["y"] if isinstance(told["y"][0], list) else [told["y"]]
    assert sorted(got) == sent
    ys = [row for position in sent for row in got[position]]
    assert (
        np.array(ys, np.float32).tolist() == np.array(whole_sequence(server, "decaying", x[:done]), np.float32).tolist()
    )


def test_a_client_that_does_not_read_is_not_read_and_delays_nobody(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect((host, int(port)))
    slow.sendall(
        b"GET /stream HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    while b"\r\n\r\n" not in slow.recv(4096):
        pass

    def frame(payload: bytes) -> bytes:
        return bytes((0x81, 0x80 | 126)) + struct.pack(">H", len(payload)) + bytes(4) + payload

    slow.sendall(frame(b'{"op": "open", "model": "lstm"}'))
    # Its ref comes back with each answer, so that the answers fill the buffers soon.
    step = frame(json.dumps({"op": "step", "session": 0, "x": [0] * FEATURES, "ref": "r" * 20_000}).encode())
    slow.settimeout(2)
    with slow:
        with pytest.raises(TimeoutError):
            for _ in range(20_000):  # 400 MB: far more than all buffers hold
                slow.sendall(step)
        with server.client() as client:
            assert client.post("/predict", json={"model": "lstm", "sequences": [frames(3)]}).status_code == 200
    with server.client() as client:
        assert client.get("/readyz").status_code == 200


def test_a_websocket_on_an_unknown_path_is_refused(server: Server) -> None:
    with pytest.raises(Exception, match=r"40[34]"), connect(server.url.replace("http", "ws") + "/nothing"):
        pass
