"""Lists of sessions, beside 70,000 of another owner: what one client asks for is paid by its own sessions alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.helpers import bearer, create, new_key
from tests.hostile.conftest import Beside
from tests.redis_server import RedisServer
from tests.server import Server, start_server

pytestmark = pytest.mark.long

THEIRS = 70_000
OWN = 5
PAGE_SECONDS = 2  # milliseconds on a quiet machine; it was 9 seconds


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, str, str]:
    """A file of API keys, and those of alice and bob."""
    file = tmp_path / "keys.txt"
    return file, new_key("alice", file), new_key("bob", file)


@pytest.fixture
def shared(examples: Path, keys: tuple[Path, str, str], tmp_path: Path) -> Iterator[tuple[Server, RedisServer]]:
    """A server over a Redis of its own."""
    (tmp_path / "redis").mkdir()
    redis = RedisServer(tmp_path / "redis", "--appendonly", "no")
    server = start_server("--models", str(examples), "--store", redis.url, "--api-keys-file", str(keys[0]), fresh=True)
    yield server, redis
    assert server.stop() == 0
    redis.stop()


def test_pages_of_one_session_beside_another_owners_many(
    shared: tuple[Server, RedisServer], keys: tuple[Path, str, str], beside: Beside
) -> None:
    server, redis = shared
    _, alice, bob = keys
    with server.client(headers=bearer(alice)) as client:
        pattern = create(client, "sunspots")
    filled = redis.ask(_fill(pattern))
    assert filled.startswith(f":{THEIRS}"), filled
    with server.client(headers=bearer(bob)) as client:
        own = [create(client, "sunspots") for _ in range(OWN)]
        with beside(server, "pages of one session beside 70,000 of another", headers=bearer(bob)):
            slowest = max(_page_through(client, own) for _ in range(20))
    assert slowest < PAGE_SECONDS


def _fill(pattern: str) -> str:
    """Returns the command that gives the owner of a session many more of it, as if each had been created."""
    script = (
        "local base = 'cellserve:{cellserve:sessions}:' "
        "local deadline = redis.call('ZSCORE', 'cellserve:sessions', KEYS[1]) "
        "for n = 1, tonumber(ARGV[1]) do local key = 'alice/many-' .. n "
        "redis.call('ZADD', 'cellserve:sessions', deadline, key) "
        "redis.call('ZADD', base .. 'of:alice', redis.call('INCR', base .. 'next'), key) end "
        "return redis.call('ZCARD', 'cellserve:sessions') - 1"
    )
    return f'EVAL "{script}" 1 alice/{pattern} {THEIRS}'


def _page_through(client: httpx.Client, own: list[str]) -> float:
    """Lists all sessions, one a page; returns the seconds of the slowest page."""
    slowest, seen, after = 0.0, set(), "0.0"
    while after is not None:
        start = time.monotonic()
        page = client.get("/sessions", params={"limit": 1, "after": after}).json()
        slowest = max(slowest, time.monotonic() - start)
        seen |= {one["session"] for one in page["sessions"]}
        after = page["next"]
    assert seen >= set(own)  # and the neighbour's
    assert len(seen) <= len(own) + 1
    return slowest
