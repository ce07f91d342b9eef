"""The load generator, compiled and driven against small servers whose behaviour is known."""

from __future__ import annotations

import asyncio
import itertools
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

import pytest
import websockets.asyncio.server
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from bench import load
from bench.load import Client, Generator, LoadFailed, Request, drive
from bench.workloads import UPGRADE, frame

GET = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
# The second chunk, of 16 bytes, holds what the end of the last one looks like; a trailer follows.
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n10\r\n\r\n0\r\n\r\n        }\r\n0\r\nA: b\r\n\r\n"
)

Server = asyncio.Server | websockets.asyncio.server.Server


@contextmanager
def running(start: Callable[[], Coroutine[None, None, Server]]) -> Iterator[int]:
    """Runs a server in a thread of its own; gives its port."""
    started: Future[int] = Future()
    stop = asyncio.Event()

    async def run() -> None:
        server = await start()
        started.set_result(next(iter(server.sockets)).getsockname()[1])
        try:
            await stop.wait()
        finally:
            server.close()
            await server.wait_closed()

    loop = asyncio.new_event_loop()

    def serve_until_stopped() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:  # its end ends the connections' tasks too
            runner.run(run())

    thread = threading.Thread(target=serve_until_stopped)
    thread.start()
    try:
        yield started.result(10)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@contextmanager
def http_server(answer: Callable[[int], Coroutine[None, None, bytes]]) -> Iterator[int]:
    """Answers each request with the bytes that `answer` returns for its number; empty bytes close the connection."""
    numbers = itertools.count(1)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                if not (data := await answer(next(numbers))):
                    break
                for begin in range(0, len(data), 40):  # in pieces, as a network may cut them
                    writer.write(data[begin : begin + 40])
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    with running(lambda: asyncio.start_server(handle, "127.0.0.1", 0)) as port:
        yield port


@contextmanager
def websocket_server(answer: Callable[[str | bytes], str | bytes]) -> Iterator[int]:
    """Answers each message."""

    async def handle(connection: ServerConnection) -> None:
        with suppress(ConnectionClosed):  # the generator goes without a closing handshake
            async for message in connection:
                await connection.send(answer(message))

    async def start() -> Server:
        return await serve(handle, "127.0.0.1", 0, compression=None)

    with running(start) as port:
        yield port


def clients(count: int, *requests: bytes, leads: tuple[bytes, ...] = (), depth: int = 1) -> list[Client]:
    return [Client([Request(data, 3) for data in requests], leads, depth)] * count


def test_a_closed_loop_counts_answers_and_time_steps_but_not_the_leads() -> None:
    asked: list[int] = []

    async def answer(number: int) -> bytes:
        asked.append(number)
        return OK if number % 2 else CHUNKED

    with http_server(answer) as port:
        found = drive(port, clients(4, GET, GET, leads=(GET, GET)), 0.3)
    assert 0 < found.answers <= len(asked) - 4 * 2
    assert found.steps_per_s == pytest.approx(3 * found.per_s, rel=1e-3)
    assert 0 < found.p50_ms <= found.p90_ms <= found.p99_ms <= found.max_ms
    assert 0 < found.busy <= 1.05


@pytest.mark.parametrize("size", [5, 300, 70_000])  # a frame's length takes 7, 16 and 64 bits
def test_websocket_frames_of_every_size_come_back(size: int) -> None:
    with websocket_server(lambda message: message) as port:
        found = drive(port, clients(2, frame(b"x" * size, 1), frame(b"y" * size, 2), leads=(UPGRADE,)), 0.3)
        deep = drive(port, clients(1, frame(b"x" * size, 2), leads=(UPGRADE, frame(b"lead", 1)), depth=3), 0.3)
    assert found.answers > 0
    assert deep.answers > 0


def test_an_open_loop_keeps_its_rate() -> None:
    async def answer(number: int) -> bytes:
        return OK

    with http_server(answer) as port:
        found = drive(port, clients(5, GET), 0.5, rate=200)
    assert found.answers in (99, 100, 101)  # all that were due within half a second, however late the answers came


def test_an_open_loop_sends_late_what_fell_due_while_its_process_did_not_run() -> None:
    async def answer(number: int) -> bytes:
        return OK

    with http_server(answer) as port:
        generator = Generator(port, clients(5, GET), 0.5, rate=200)
        generator.wait_for_start()
        generator._process.send_signal(signal.SIGSTOP)
        time.sleep(0.7)  # beyond the end of the measured time
        generator._process.send_signal(signal.SIGCONT)
        found = generator.result()
    assert found.answers in (99, 100, 101)
    assert found.max_ms >= 600


def test_open_loop_latencies_include_every_request_that_a_stall_delayed() -> None:
    stall, rate = 0.4, 250

    async def answer(number: int) -> bytes:
        if number == 100:
            threading.Event().wait(stall)  # stalls the whole server
        return OK

    with http_server(answer) as port:
        found = drive(port, clients(2, GET), 1.0, rate=rate)
        closed = drive(port, clients(2, GET), 1.0)
    # 100 of 250 requests were due during the stall, and half of those waited for more than half of it. A generator that
    # waits for an answer before it sends the next request would have seen two slow ones.
    assert found.max_ms >= 1000 * stall
    assert found.p90_ms >= 1000 * stall * 0.3
    assert closed.answers > 0


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nfull", "503"),
        (b"", "closed"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "length"),
    ],
)
def test_an_http_error_a_closed_connection_and_a_missing_length_fail_the_load(answers: bytes, told: str) -> None:
    async def answer(number: int) -> bytes:
        return OK if number < 10 else answers

    with http_server(answer) as port, pytest.raises(LoadFailed, match=told):
        drive(port, clients(2, GET), 0.3)


def test_an_error_frame_fails_the_load() -> None:
    with websocket_server(lambda message: '{"op":"error","problem":{}}') as port, pytest.raises(LoadFailed, match="op"):
        drive(port, clients(1, frame(b"step", 1), leads=(UPGRADE,)), 0.2)
    with websocket_server(lambda message: "text") as port, pytest.raises(LoadFailed, match="bad"):
        drive(port, clients(1, frame(b"binary", 2), leads=(UPGRADE,)), 0.2)


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(load, "FLAGS", ("-O1",))  # so that none is there yet
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LoadFailed, match="apt-get install gcc"):
        load.build()
