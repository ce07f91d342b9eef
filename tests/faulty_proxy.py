"""A TCP proxy between a client and a server that misbehaves as a test says, request by request."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from urllib.parse import urlsplit

DELAY_SECONDS = 1.0

_REQUEST = re.compile(rb"(GET|POST|PUT|DELETE) ")
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbusy"
_BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 15\r\nConnection: close\r\n\r\n<html>bad</html"


class FaultyProxy:
    """What is sent takes the next of `faults`, in the order of sending, and goes well where there are none left.

    lose: the server has it, and its answer is lost with the connection. cut: half of the answer comes. delay: the
    answer comes after DELAY_SECONDS. busy, bad gateway: the server never sees it (frames go well, it waits for a
    handshake).
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = parts.hostname, parts.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.faults: deque[str] = deque()
        self.done: Counter[str] = Counter()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                _Connection(self, connection, self._target)


class _Connection:
    def __init__(self, proxy: FaultyProxy, client: socket.socket, target: tuple[str | None, int | None]) -> None:
        self.proxy, self.client, self.fault = proxy, client, "none"
        try:
            self.server = socket.create_connection(target)
        except OSError:
            client.close()
            return
        for work in (self._up, self._down):
            threading.Thread(target=self._guarded, args=(work,), daemon=True).start()

    def _guarded(self, work: object) -> None:
        assert callable(work)
        with suppress(OSError):
            work()
        for end in (self.client, self.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _up(self) -> None:
        frames = False
        while data := self.client.recv(1 << 20):
            request = bool(_REQUEST.match(data))
            if request or frames:
                self.fault = self.proxy.faults.popleft() if self.proxy.faults else "none"
                if not request and self.fault in ("busy", "bad gateway"):
                    self.proxy.faults.appendleft(self.fault)
                    self.fault = "none"
                self.proxy.done[self.fault] += 1
            if request:
                frames = b"upgrade: websocket" in data.lower()
            if self.fault in ("busy", "bad gateway"):
                self._read_whole(data)
                self.client.sendall(_BUSY if self.fault == "busy" else _BAD_GATEWAY)
                return
            self.server.sendall(data)

    def _read_whole(self, data: bytes) -> None:
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        while len(body) < (int(length[1]) if length else 0):
            body += self.client.recv(1 << 20)

    def _down(self) -> None:
        while data := self.server.recv(1 << 20):
            if self.fault == "lose":
                return
            if self.fault == "cut":
                self.client.sendall(data[: len(data) // 2])
                return
            if self.fault == "delay":
                time.sleep(DELAY_SECONDS)
            self.client.sendall(data)
