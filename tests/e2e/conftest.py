"""Fixtures of the end-to-end tests: clients and connections of a module's server, stores, keys."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.e2e.helpers import new_key, store_of
from tests.kinds import write_repository
from tests.redis_server import RedisServer
from tests.server import Server


@pytest.fixture(scope="module", params=["memory", "lmdb", "redis"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Each of the stores in turn, as `--store` takes it."""
    return store_of(request, tmp_path_factory)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """An HTTP client of the module's server."""
    with server.client() as client:
        yield client


@pytest.fixture
def stream(server: Server) -> Iterator[ClientConnection]:
    """A connection to `/stream` of the module's server."""
    with connect(server.url.replace("http", "ws") + "/stream", max_size=None) as socket:
        yield socket


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that a test may stop, truncate and fill."""
    redis = RedisServer(tmp_path)
    yield redis
    redis.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of small models of every kind of signature."""
    return write_repository(tmp_path_factory.mktemp("kinds"))


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, str, str]:
    """A file of API keys, and those of alice and bob."""
    file = tmp_path / "keys.txt"
    return file, new_key("alice", file), new_key("bob", file)
