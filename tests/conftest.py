"""What the tests share: small networks exported for real, the example models, and real server processes."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest

from tests import budgets  # noqa: F401  before pytest loads the profile that it is told
from tests.helpers import ROOT
from tests.redis_server import RedisServer
from tests.server import Serve, Server, start_server

EXAMPLES = ROOT / "artifacts"  # made by `make setup`
END = "-----END CERTIFICATE-----\n"


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lets `tempfile` write where pytest removes what is left."""
    tempfile.tempdir = str(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session", autouse=True)
def one_certificate(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Has clients trust one authority: no test needs any, and to load them all takes a client 40 ms."""
    file = tmp_path_factory.mktemp("certificates") / "one.pem"
    file.write_text(Path(certifi.where()).read_text().partition(END)[0] + END)
    os.environ["SSL_CERT_FILE"] = str(file)


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
def vad(once: Callable[[str, Callable[[Path], Path]], Path]) -> Path:
    """A repository of Silero VAD, adopted."""
    from tests.silero import adopt

    return once("vad", adopt)


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
def serve() -> Iterator[Serve]:
    """Starts servers with given flags, and ends them with the test."""
    started: list[Server] = []

    def start(*flags: str, **options: Any) -> Server:
        started.append(start_server(*flags, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop(signal.SIGKILL)
