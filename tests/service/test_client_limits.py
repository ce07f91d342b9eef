"""Limits on one client's sessions: it neither fills the server nor evicts those of others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cellserve.service.engine.engine import Engine
from cellserve.service.errors import ServerFull
from cellserve.service.sessions.session import NO_LIMITS, ClientLimits, Session, peer
from cellserve.service.sessions.stores.memory import MemoryStore
from cellserve.service.sessions.table import SessionTable
from cellserve.service.settings import WhenFull
from tests.service.helpers import machinery

STATE_BYTES = 8  # of the model's states


@pytest.fixture
def engine() -> Engine:
    return machinery()[0]


@pytest.fixture(autouse=True)
def no_peer() -> Iterator[None]:
    token = peer.set("")
    yield
    peer.reset(token)


def store_of(engine: Engine, limits: ClientLimits, when_full: WhenFull = "refuse") -> MemoryStore:
    now = iter(range(1000, 100_000))
    table = SessionTable(10**9, lambda: float(next(now)))
    table.register(engine)
    return MemoryStore(table, 10, 86400, when_full, client_limits=limits)


def create(store: MemoryStore, engine: Engine, address: str, owner: str = "") -> Session:
    peer.set(address)
    return store.create_now(engine, None, owner)[0]


@pytest.mark.parametrize("limits", [NO_LIMITS._replace(sessions=3), NO_LIMITS._replace(state_bytes=3 * STATE_BYTES)])
def test_a_client_is_refused_beyond_its_limit_and_others_are_not(engine: Engine, limits: ClientLimits) -> None:
    store = store_of(engine, limits)
    greedy = [create(store, engine, "10.0.0.7") for _ in range(3)]
    with pytest.raises(ServerFull, match="a client may have"):
        create(store, engine, "10.0.0.7")
    create(store, engine, "10.0.0.8")
    store._end(greedy[0], "deleted")
    create(store, engine, "10.0.0.7")
    assert {name: own.count for name, own in store.table.by_client.items()} == {"10.0.0.7": 3, "10.0.0.8": 1}


def test_owners_of_keys_are_told_apart_at_one_address(engine: Engine) -> None:
    store = store_of(engine, NO_LIMITS._replace(sessions=2))
    for owner in ("alice", "bob"):
        for _ in range(2):
            create(store, engine, "10.0.0.7", owner)
        with pytest.raises(ServerFull):
            create(store, engine, "10.0.0.8", owner)


def test_with_eviction_a_client_at_its_limit_evicts_its_own(engine: Engine) -> None:
    store = store_of(engine, NO_LIMITS._replace(sessions=3), "evict")
    other = create(store, engine, "10.0.0.8")
    greedy = [create(store, engine, "10.0.0.7") for _ in range(20)]
    assert other.alive
    assert [session.alive for session in greedy] == [False] * 17 + [True] * 3


def test_what_is_known_of_a_client_ends_with_its_last_session(engine: Engine) -> None:
    store = store_of(engine, NO_LIMITS)
    store._end(create(store, engine, "10.0.0.7"), "deleted")
    assert store.table.by_client == {}
    assert not engine.arena.client.any()
