"""Connections that flood the server or hold on to it cost nobody else anything, and are ended."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.helpers import free_port, until
from tests.hostile.conftest import Beside
from tests.server import Serve, Server, start_server

pytestmark = pytest.mark.long

MB = 2**20
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
HANDSHAKE = (
    b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA==\r\n"
)


def connected(server: Server, source: str = "127.0.0.2") -> socket.socket:
    """A connection from an address of its own."""
    address = urlsplit(server.url)
    return socket.create_connection(("127.0.0.1", address.port or 0), timeout=10, source_address=(source, 0))


def flood(connection: socket.socket, data: bytes, size: int, seconds: float = 10) -> int:
    """Sends data over and over, until so much is sent or the server takes no more; returns what was sent."""
    deadline, sent = time.monotonic() + seconds, 0
    connection.settimeout(0.5)
    try:
        while sent < size and time.monotonic() < deadline:
            sent += connection.send(data)
    except OSError:
        pass
    return sent


def rest(connection: socket.socket, seconds: float = 5) -> bytes:
    """What the server sends until it closes the connection; raises TimeoutError if it does not."""
    answer, deadline = b"", time.monotonic() + seconds
    while True:
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            part = connection.recv(MB)
        except ConnectionError:
            return answer
        if not part:
            return answer
        answer += part


def statuses(answer: bytes) -> list[int]:
    """The statuses of the answers."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answer)]


def masked(opcode: int, payload: bytes = b"", fin: bool = True) -> bytes:
    """A client's frame."""
    length = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + struct.pack("!H", len(payload))
    return bytes([(0x80 if fin else 0) | opcode]) + length + bytes(4) + payload


@pytest.mark.parametrize(
    ("begin", "endless", "status"),
    [
        (HEAD + b"X: ", b"x" * MB, 431),
        (b"GET /", b"x" * MB, 414),
        (HEAD, b"a: b\r\n" * 100_000, 431),
        (CHUNKED + b"0\r\nX: ", b"x" * MB, 431),
        (CHUNKED + b"2;", b"x" * MB, 431),
    ],
    ids=["a header", "a target", "headers", "a trailer", "a chunk's extension"],
)
def test_heads_without_end_are_refused(
    server: Server, beside: Beside, begin: bytes, endless: bytes, status: int
) -> None:
    with beside(server, f"{endless[:4]!r} without end, after {begin[-10:]!r}") as seen, ExitStack() as opened:
        for _ in range(10):
            connection = opened.enter_context(connected(server))
            connection.sendall(begin)
            assert flood(connection, endless, 300 * MB) < 100 * MB
            assert statuses(rest(connection)) in ([status], [])  # a client that still sends may lose the answer
    assert seen.grown_bytes < 50 * MB


def test_heads_up_to_the_limits_are_taken(server: Server) -> None:
    longest = b"GET /healthz?" + b"x" * 8000 + b" HTTP/1.1\r\nHost: x\r\n"
    for head in (
        longest,
        longest + b"a: b\r\n" * 99,
        b"GET /healthz HTTP/1.1\r\nHost: x\r\na: " + b"x" * 65_000 + b"\r\n",
    ):
        with connected(server) as connection:
            connection.sendall(head + b"Connection: close\r\n\r\n") if b"a: b" not in head else connection.sendall(
                head + b"\r\n" + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
            )
            assert set(statuses(rest(connection))) == {200}


def test_pipelined_requests_wait_unparsed(server: Server, beside: Beside) -> None:
    flood_of_requests = GET * (MB // len(GET))
    with beside(server, "16 MB of pipelined requests on each of 20 connections") as seen, ExitStack() as opened:
        connections = [opened.enter_context(connected(server)) for _ in range(20)]
        for connection in connections:
            flood(connection, flood_of_requests, 16 * MB, seconds=1)
    assert seen.grown_bytes < 50 * MB


def test_requests_on_many_connections_take_turns(server: Server, beside: Beside) -> None:
    with beside(server, "requests on 300 connections, as fast as they go"), ExitStack() as opened:
        connections = [opened.enter_context(connected(server, "127.0.0.8")) for _ in range(300)]
        for path in (b"/models", b"/nothing"):
            for connection in connections:
                connection.setblocking(False)
                with suppress(OSError):
                    connection.send((b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n") * 100)
            time.sleep(2)


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    with connected(server) as connection:
        connection.sendall(GET * 50 + HEAD + b"Content-Length: 2\r\n\r\n{}" + GET * 50 + b"nonsense\r\n\r\n")
        assert statuses(rest(connection)) == [200] * 50 + [422] + [200] * 50 + [400]


@pytest.mark.parametrize(
    ("begin", "endless"),
    [
        (b"", masked(9)),
        (masked(1, fin=False), masked(0, fin=False)),
        (masked(1, fin=False), masked(0, b"x", fin=False)),
        (b"", masked(1, b"{}")),
        (b"", masked(2, b"x" * 100)),
    ],
    ids=["pings", "empty fragments", "fragments of a byte", "bad frames", "bad binary frames"],
)
def test_floods_of_frames_take_turns(server: Server, beside: Beside, begin: bytes, endless: bytes) -> None:
    with beside(server, f"frames {endless[:8]!r} without end") as seen, ExitStack() as opened:
        connections = []
        for _ in range(20):
            connections.append(connection := opened.enter_context(connected(server)))
            connection.sendall(HANDSHAKE + b"\r\n")
            answer = connection.recv(1000)
            assert answer.startswith(b"HTTP/1.1 101"), answer
            connection.sendall(begin)
        for connection in connections:
            flood(connection, endless * 50_000, 2 * MB, seconds=0.3)
        time.sleep(1)
    assert seen.grown_bytes < 100 * MB


@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"Content-Length: 5\r\n",
        b"X: " + b"x" * 9000 + b"\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"X: \xff\x01\r\n",
        b"Origin: http://x\r\n" * 2,
        b"Sec-WebSocket-Version: 13\r\n",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    ],
)
def test_wrong_handshakes_are_answered_and_closed(serve: Serve, examples: Path, lines: bytes) -> None:
    server = serve("--models", str(examples))
    handshake = HANDSHAKE if lines else HANDSHAKE.replace(b"Sec-WebSocket-Key", b"X-Key")
    with connected(server) as connection:
        connection.sendall(handshake + lines + b"Connection: close\r\n\r\n")
        assert statuses(rest(connection))[0] in (400, 426)
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


STRICT = {
    "no Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /healthz\r\n\r\n", 400),
    "HTTP/2.0": (b"GET /healthz HTTP/2.0\r\nHost: x\r\n\r\n", 400),
    "identity": (HEAD + b"Transfer-Encoding: identity\r\n\r\n", 400),
    "identity, chunked": (HEAD + b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked twice": (HEAD + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n", 400),
    "chunked and a length": (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
    "chunked in HTTP/1.0": (HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", STRICT)
def test_what_could_be_read_in_two_ways_is_refused(server: Server, name: str) -> None:
    request, status = STRICT[name]
    with connected(server) as connection:
        connection.sendall(request)
        assert statuses(rest(connection)) == [status]


def test_the_operations_port_has_the_same_bounds(serve: Serve, examples: Path) -> None:
    port = free_port()
    serve("--models", str(examples), "--operations-port", str(port), "--head-seconds", "1")
    for request, status in [*STRICT.values(), (HEAD + b"X: " + b"x" * 70_000, 431), (b"GET /", 408)]:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(request)
            assert statuses(rest(connection)) == [status]


def test_other_upgrades_are_ignored(server: Server) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    with connected(server) as connection:
        connection.sendall(HEAD + upgrade + b"Content-Length: 2\r\n\r\n{}" + GET + b"bad\r\n\r\n")
        assert statuses(rest(connection)) == [422, 200, 400]


def test_a_trailer_is_no_header_of_its_request_nor_of_the_next(server: Server) -> None:
    with connected(server) as connection:
        connection.sendall(CHUNKED + b"0\r\nX-Request-Id: trailer\r\n\r\n" + GET + b"bad\r\n\r\n")
        answer = rest(connection)
        assert statuses(answer) == [422, 200, 400] and b"trailer" not in answer


@pytest.fixture
def impatient(serve: Serve, examples: Path) -> Server:
    """A server that waits for a second at most."""
    limits = [f"--{name}-seconds=1" for name in ("head", "body", "answer", "idle", "pong")]
    return serve("--models", str(examples), *limits)


HOSTAGES = {
    "nothing": (b"", []),
    "a head without end": (b"GET /healthz HTTP/1.1\r\nHo", [408]),
    "a head after a request": (GET + b"GET /heal", [200, 408]),
    "a body without end": (HEAD + b"Content-Length: 100\r\n\r\n{", [408]),
    "a body that never begins": (HEAD + b"Content-Length: 100\r\n\r\n", [408]),
    "chunks without end": (CHUNKED, [408]),
    "a body of the fast path": (b"POST /sessions/x/step" + HEAD[13:] + b"Content-Length: 100\r\n\r\n{", [408]),
    "a body that is answered before its end": (
        HEAD.replace(b"json", b"xml") + b"Content-Length: 100\r\n\r\n{",
        [415, 408],
    ),
    "no further request": (GET, [200]),
    "no further request, but line breaks": (GET + b"\r\n\r\n", [200]),
    "a socket without pongs": (HANDSHAKE + b"\r\n", [101]),
    "a message without end": (HANDSHAKE + b"\r\n" + masked(1, b"{", fin=False), [101]),
}


def test_no_connection_waits_for_ever(impatient: Server, beside: Beside) -> None:
    with beside(impatient, "connections that wait"), ExitStack() as opened:
        held = {name: opened.enter_context(connected(impatient)) for name in HOSTAGES}
        for name, (data, _) in HOSTAGES.items():
            held[name].sendall(data)
        for name, (_, expected) in HOSTAGES.items():
            assert statuses(rest(held[name], seconds=10)) == expected, name


def test_heads_and_bodies_a_byte_at_a_time_are_closed(impatient: Server) -> None:
    for data in (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ", HEAD + b"Content-Length: 1000\r\n\r\n"):
        with connected(impatient) as connection:
            connection.sendall(data)
            for _ in range(100):
                time.sleep(0.1)
                try:
                    connection.sendall(b"x")
                except ConnectionError:
                    break
            else:
                pytest.fail("never closed")


def unread_answers(server: Server, source: str = "127.0.0.2") -> socket.socket:
    """A connection whose client reads nothing of its large answers, which the kernel does not buffer all."""
    body = b'{"model":"characters","outputs":"all","sequences":[[' + b"1," * 4_000 + b"1]]}"
    connection = connected(server, source)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall((HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 8)
    return connection


def test_an_answer_that_is_not_read_is_dropped(impatient: Server, beside: Beside) -> None:
    with beside(impatient, "5 readers of large answers that stop") as seen, ExitStack() as opened:
        connections = [opened.enter_context(unread_answers(impatient)) for _ in range(5)]
        for connection in connections:
            reset = select.poll()
            reset.register(connection, 0)
            assert reset.poll(60_000)
    assert seen.grown_bytes < 50 * MB


def test_a_stop_waits_for_no_hostage(serve: Serve, examples: Path) -> None:
    server = serve("--models", str(examples))
    with ExitStack() as opened:
        for data, _ in HOSTAGES.values():
            opened.enter_context(connected(server)).sendall(data)
        opened.enter_context(unread_answers(server))
        time.sleep(1)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 10  # and not --shutdown-seconds


def test_a_second_signal_still_closes_the_store(serve: Serve, examples: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    flags = "--models", str(examples), "--store", f"lmdb:{store}"
    server = serve(*flags)
    with server.client() as client, connected(server) as hostage:
        session = client.post("/sessions", json={"model": "sunspots"}).json()["session"]
        hostage.sendall(HOSTAGES["a body without end"][0])
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert server.stop(signal.SIGINT) == 0
    again = serve(*flags)
    with again.client() as client:
        assert client.get(f"/sessions/{session}").status_code == 200


@pytest.fixture
def small(serve: Serve, examples: Path) -> Iterator[Server]:
    """A server of few connections."""
    yield serve("--models", str(examples), "--max-connections", "20", "--max-connections-per-client", "10")


def asked(server: Server, source: str, path: bytes = b"/models") -> list[int]:
    """The statuses of the answers to one request, on a connection of its own."""
    with connected(server, source) as connection:
        connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return statuses(rest(connection))


def test_one_client_does_not_take_all_connections(small: Server, beside: Beside) -> None:
    with beside(small, "connections without end"), ExitStack() as opened:
        held = [opened.enter_context(connected(small)) for _ in range(200)]
        time.sleep(0.2)
        assert asked(small, "127.0.0.3") == [200]
        assert len(held) == 200


def test_health_is_answered_where_all_connections_are_taken(small: Server) -> None:
    with ExitStack() as opened:
        for source in ("127.0.0.3", "127.0.0.4"):
            for _ in range(10):
                opened.enter_context(connected(small, source))
        time.sleep(0.2)
        assert asked(small, "127.0.0.5") == [503]
        assert asked(small, "127.0.0.5", b"/healthz") == asked(small, "127.0.0.5", b"/readyz") == [200]
    time.sleep(0.2)
    assert asked(small, "127.0.0.5") == [200]


def test_the_limit_of_open_files_is_never_reached(examples: Path, serve: Serve) -> None:
    server = serve("--models", str(examples), "--max-connections-per-client", "10000", files=600)
    with ExitStack() as opened:
        for _ in range(550):
            opened.enter_context(connected(server))
        time.sleep(0.5)
        assert asked(server, "127.0.0.5") == [503]
        assert asked(server, "127.0.0.5", b"/healthz") == [200]
    time.sleep(0.5)
    assert asked(server, "127.0.0.5") == [200]


def test_an_escaped_slash_is_part_of_an_id(server: Server) -> None:
    with server.client() as client:
        assert client.get("/sessions/a%2Fb").status_code == 404
        answer = client.post("/sessions/a%2Fstep", json={"x": [0.25]})
        assert answer.status_code == 405 and "unknown-session" not in answer.text
        assert client.put("/sessions/a%2Fb", json={"model": "sunspots"}).status_code == 422


def test_grpc_calls_of_an_address_and_connections_are_bounded(serve: Serve, examples: Path) -> None:
    server = serve(
        "--models", str(examples), "--grpc-port", "0", "--max-connections", "8", "--max-connections-per-client", "3"
    )
    host, _, port = server.grpc.rpartition(":")
    with ExitStack() as opened:
        own = (("grpc.use_local_subchannel_pool", 1),)  # a connection of its own: one has room for three calls
        first, second = (opened.enter_context(grpc.insecure_channel(server.grpc, own)) for _ in range(2))
        watching, asking = health_pb2_grpc.HealthStub(first), health_pb2_grpc.HealthStub(second)
        watches = [watching.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(3)]
        for watch in watches:
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            asking.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "3 calls under way" in refused.value.details()
        watches[0].cancel()

        def is_answered() -> bool:
            with suppress(grpc.RpcError):
                return bool(asking.Check(health_pb2.HealthCheckRequest(), timeout=10))
            return False

        until(is_answered, seconds=10)
        idle = [opened.enter_context(socket.create_connection((host, int(port)))) for _ in range(20)]
        for connection in idle:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        ended = [connection for connection in idle if not _is_open(connection)]
        assert len(ended) >= 12
        assert is_answered()  # on the connection that it has


@pytest.fixture(scope="module")
def speaking_grpc(examples: Path) -> Iterator[Server]:
    """A server of the example models that speaks gRPC too."""
    server = start_server("--models", str(examples), "--grpc-port", "0", fresh=True)
    yield server
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


def _is_open(connection: socket.socket) -> bool:
    """Whether a server has answered HTTP/2's preface and keeps the connection."""
    connection.settimeout(5)
    try:
        return bool(connection.recv(MB))
    except OSError:
        return False


def http2(kind: int, flags: int = 0, payload: bytes = b"", stream: int = 0) -> bytes:
    """A frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2(4)
CALL = b"".join(
    bytes((0, len(name))) + name + bytes((len(value),)) + value
    for name, value in (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/inference.GRPCInferenceService/ServerLive"),
        (b":authority", b"x"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
)


def calls(*frames: tuple[int, int, bytes]) -> bytes:
    """Frames of 400 streams, one after the other."""
    return b"".join(http2(*frame, stream) for stream in range(1, 800, 2) for frame in frames)


HTTP2_FLOODS = {
    "header fields in CONTINUATION frames": http2(1, 0, CALL, 1) + http2(9, 0, b"\x00\x01a\x01b" * 3000, 1) * 200,
    "indexed header fields": calls((1, 0, CALL), *[(9, 0, b"\x90" * 16_000)] * 6, (9, 4, b"")),
    "indexed header fields, a frame a call": calls((1, 4, CALL + b"\x90" * 10_000)),
    "CONTINUATION frames of nothing": http2(1, 0, CALL, 1) + http2(9, 0, b"", 1) * 100_000,
    "pings": http2(6, 0, bytes(8)) * 100_000,
    "settings": http2(4, 0, b"\0\3\0\0\0\x64") * 100_000,
    "priorities": http2(2, 0, b"\0\0\0\3\x10", 1) * 100_000,
    "windows": http2(8, 0, b"\0\0\0\1") * 100_000,
    "frames of nothing": http2(1, 4, CALL, 1) + http2(0, 0, b"", 1) * 100_000,
    "streams that are opened and reset": calls((1, 4, CALL), (3, 0, b"\0\0\0\x08")),
    "calls": calls((1, 4, CALL), (0, 1, bytes(5))),
}


@pytest.mark.parametrize("name", HTTP2_FLOODS)
def test_floods_of_http2_frames_take_turns(speaking_grpc: Server, beside: Beside, name: str) -> None:
    host, _, port = speaking_grpc.grpc.rpartition(":")
    with beside(speaking_grpc, f"gRPC: {name} without end") as seen:
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            with socket.create_connection((host, int(port))) as connection:
                flood(connection, PREFACE, len(PREFACE))
                flood(connection, HTTP2_FLOODS[name], 4 * MB, seconds=0.5)
    assert seen.grown_bytes < 100 * MB
    with grpc.insecure_channel(speaking_grpc.grpc) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_grpc_connections_without_calls_are_ended(serve: Serve, examples: Path) -> None:
    server = serve("--models", str(examples), "--grpc-port", "0", "--head-seconds", "1", "--idle-seconds", "2")
    host, _, port = server.grpc.rpartition(":")
    began = {"nothing": b"", "half a preface": PREFACE[:8], "no call": PREFACE, "half": PREFACE + http2(1, 0, CALL, 1)}
    with ExitStack() as opened:
        held = {name: opened.enter_context(socket.create_connection((host, int(port)))) for name in began}
        for name, data in began.items():
            held[name].sendall(data)
        for connection in held.values():
            rest(connection, seconds=20)  # and does not raise


def test_grpc_calls_whose_message_never_comes_count(serve: Serve, examples: Path) -> None:
    server = serve("--models", str(examples), "--grpc-port", "0", "--max-connections-per-client", "3")
    host, _, port = server.grpc.rpartition(":")
    with ExitStack() as opened:
        for _ in range(2):
            opened.enter_context(begun := socket.create_connection((host, int(port))))
            begun.sendall(PREFACE + b"".join(http2(1, 4, CALL, stream) for stream in (1, 3)))
        channel = opened.enter_context(grpc.insecure_channel(server.grpc))
        check = health_pb2_grpc.HealthStub(channel).Check

        def is_refused() -> bool:
            with suppress(grpc.RpcError):
                return not check(health_pb2.HealthCheckRequest(), timeout=60)
            return True

        until(is_refused)
        with pytest.raises(grpc.RpcError, match="3 calls under way"):
            check(health_pb2.HealthCheckRequest(), timeout=60)


def test_grpcs_own_threads_run_behind_the_event_loop(speaking_grpc: Server) -> None:
    process = speaking_grpc.process.pid
    own = [int(thread.name) for thread in Path(f"/proc/{process}/task").iterdir()
           if (thread / "comm").read_text() in ("event_engine\n", "lifeguard\n")]  # fmt: skip
    niceness = os.getpriority(os.PRIO_PROCESS, process)
    assert own
    assert all(os.getpriority(os.PRIO_PROCESS, thread) > niceness for thread in own)


def test_a_grpc_call_with_too_many_fields_is_told_so(speaking_grpc: Server) -> None:
    with grpc.insecure_channel(speaking_grpc.grpc) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        few = [(f"x-{place}", "v") for place in range(80)]
        assert check(health_pb2.HealthCheckRequest(), timeout=10, metadata=few)
        with pytest.raises(grpc.RpcError) as refused:
            check(health_pb2.HealthCheckRequest(), timeout=10, metadata=few + few)
    assert refused.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
