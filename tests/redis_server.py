"""A real Redis for the tests: a process of its own in a folder of its own."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class RedisServer:
    """A redis-server that writes every command to its file before it answers."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.port, self.folder, self.flags = free_port(), folder, flags
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        assert program, "redis-server is missing: `make test` installs it, or apt-get install redis-server"
        flags = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        flags += ["--appendonly", "yes", "--appendfsync", "always", "--loglevel", "warning", *self.flags]
        self.process = subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                    connection.sendall(b"PING\r\n")
                    if connection.recv(64).startswith(b"+PONG"):
                        return
            except OSError:
                pass
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(timeout=20)

    def ask(self, command: str) -> str:
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(f"{command}\r\n".encode())
            return connection.recv(1 << 16).decode()

    def flush(self) -> None:
        assert self.ask("FLUSHALL").startswith("+OK")
