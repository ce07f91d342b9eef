"""What the tests share: small networks exported for real, the example models, and real server processes."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import budgets  # noqa: F401  before pytest loads the profile that it is told
from tests.redis_server import RedisServer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "artifacts"  # made by `make setup`


@dataclass
class Server:
    """A `cellserve serve` process of its own."""

    process: subprocess.Popen[str]
    url: str
    log: list[str] = field(default_factory=list)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    @property
    def grpc(self) -> str:
        """Where it speaks gRPC, if it was started with `--grpc-port 0`."""
        found = re.search(r"gRPC on (\S+)", "".join(self.log))
        assert found
        return found[1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal, waits for the end, and gives the exit status."""
        if self.process.poll() is None:
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)  # its workers too
            else:
                self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=60)
        self.log.append(out)
        return self.process.returncode


def start_server(*flags: str, environment: dict[str, str] | None = None) -> Server:
    """Starts a server on a free port and waits until it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cellserve.cli", "serve", "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )
    assert process.stdout
    log = []
    for line in process.stdout:
        log.append(line)
        found = re.search(r"running on (http://\S+)", line)
        if found:
            return Server(process, found[1], log)
    raise AssertionError("the server did not start:\n" + "".join(log))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str, Callable[[Path], Path]], Path]:
    """Makes what is costly once for all workers of a run: `once(name, make)` gives what `make(folder)` gave."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def once(name: str, make: Callable[[Path], Path]) -> Path:
        made = shared / f"{name}.made"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait here until it is made
            if not made.exists():
                made.write_text(str(make(Path(tempfile.mkdtemp(prefix=name, dir=shared)))))
        return Path(made.read_text())

    return once


@pytest.fixture(scope="session")
def repository(once: Callable[[str, Callable[[Path], Path]], Path]) -> Path:
    """A model repository of small networks: lstm and rnn (5 features, 3 outputs), decaying (a cell of a user's own)."""
    from tests.networks import export_small_networks

    return once("repository", export_small_networks)


@pytest.fixture(scope="session")
def examples() -> Path:
    """The example models, as `make setup` leaves them."""
    missing = [name for name in ("vowels", "sunspots", "characters") if not (EXAMPLES / name).is_dir()]
    assert not missing, f"the example models {missing} are missing: run `make setup`"
    return EXAMPLES


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real Redis."""
    redis = RedisServer(tmp_path_factory.mktemp("redis"))
    yield redis
    redis.stop()


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    """A server of the small networks, for one module's tests."""
    server = start_server("--models", str(repository))
    yield server
    assert server.stop() == 0


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers with given flags, and ends them with the test."""
    started: list[Server] = []

    def start(*flags: str, **options: Any) -> Server:
        started.append(start_server(*flags, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop(signal.SIGKILL)
