"""Eviction (`--when-full evict`) of each store, where states have different sizes and sessions have just expired."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from tests.e2e.helpers import create
from tests.server import Serve

RNN_BYTES, LSTM_BYTES = 64, 128  # of their states


def alive(client: httpx.Client, sessions: Sequence[str]) -> list[bool]:
    return [client.get(f"/sessions/{session}").status_code == 200 for session in sessions]


def test_a_large_state_takes_the_room_of_as_many_small_ones_as_it_needs_or_of_none(
    repository: Path, serve: Serve, store: str
) -> None:
    flags = "--models", str(repository), "--store", store, "--when-full", "evict", "--max-session-bytes-per-owner"
    server = serve(*flags, str(3 * RNN_BYTES))
    with server.client() as client:
        small = [create(client, "rnn") for _ in range(3)]
        large = create(client, "lstm")
        assert alive(client, [*small, large]) == [False, False, True, True]
    server.stop()
    with serve(*flags, str(LSTM_BYTES - 1)).client() as client:
        small = [create(client, "rnn")]
        for _ in range(2):
            assert client.post("/sessions", json={"model": "lstm"}).status_code == 503
            assert alive(client, small) == [True]
        client.delete(f"/sessions/{small[0]}")
        assert client.post("/sessions", json={"model": "lstm"}).status_code == 503


@pytest.mark.parametrize("when_full", ["evict", "refuse"])
@pytest.mark.parametrize("sync", ["checkpoints", "always"])
def test_sessions_that_have_just_expired_make_room(
    repository: Path, serve: Serve, tmp_path: Path, sync: str, when_full: str
) -> None:
    flags = "--models", str(repository), "--store", f"lmdb:{tmp_path / 'store'}", "--store-sync", sync
    server = serve(*flags, "--max-sessions", "4", "--session-idle-seconds", "1", "--when-full", when_full)
    with server.client() as client:
        for _ in range(3):
            for _ in range(4):
                create(client, "rnn")
            time.sleep(1.2)  # the store looks after itself once a second: some are still there
