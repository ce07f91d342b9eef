"""A real Redis for the tests: a process of its own in a folder of its own."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from pathlib import Path

from tests.helpers import free_port, until


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
        until(lambda: self.ask("PING").startswith("+PONG"))

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(timeout=60)

    def ask(self, command: str) -> str:
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(f"{command}\r\n".encode())
            return connection.recv(1 << 16).decode()

    def flush(self) -> None:
        assert self.ask("FLUSHALL").startswith("+OK")
