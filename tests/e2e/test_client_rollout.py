"""Streamed rollouts through the Python client: every output once, even if connections are lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellserve import AsyncClient, Client
from cellserve.errors import CannotRollOut, InvalidInput, PositionConflict, RetriesExhausted
from tests.e2e.helpers import QUICK, SHORT, killed_again_and_again
from tests.faulty_proxy import FaultyProxy
from tests.redis_server import RedisServer
from tests.server import Serve, Server, start_server

ASKED: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "seed": 7}


@pytest.fixture(scope="module")
def server(examples: Path) -> Iterator[Server]:
    server = start_server("--models", str(examples))
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def whole(client: Client, steps: int) -> str:
    with client.session("characters") as session:
        return session.rollout("Alice was", steps, **ASKED).text or ""


def test_streamed_outputs_are_those_of_a_rollout_at_once(client: Client, server: Server) -> None:
    text = whole(client, 50)
    with client.session("characters") as session, session.rollout_stream("Alice was", 30, **ASKED) as letters:
        told = list(letters)
        assert [one.position for one in told] == list(range(9, 39)) and session.position == session.refresh() == 38
        assert "".join(one.label or "" for one in told) == text[:30]
        rest = session.rollout_stream(told[-1].symbol or 0, 20, **ASKED)
        assert "".join(one.label or "" for one in rest) == text[30:]
        assert list(rest) == []

    async def other_form() -> str:
        async with (
            AsyncClient(server.url) as mine,
            mine.session("characters") as session,
            session.rollout_stream("Alice was", 50, **ASKED) as letters,
        ):
            return "".join([one.label or "" async for one in letters])

    assert asyncio.run(other_form()) == text
    with client.session("sunspots") as months, client.session("sunspots") as others:
        y = np.stack([one.y for one in months.rollout_stream([[96.7], [104.3]], 5) if one.y is not None])
        at_once = others.rollout([[96.7], [104.3]], 5).y
        assert at_once is not None and y.tobytes() == at_once.tobytes()


def test_a_reader_that_stops_can_continue_from_the_sessions_position(client: Client) -> None:
    with client.session("characters") as session:
        with session.rollout_stream("Alice was", 4000, **ASKED) as letters:
            assert len(list(islice(letters, 5))) == 5
        for _ in range(1000):  # until the server notices that nobody reads
            try:
                assert 13 <= session.refresh() < 4008
                session.reset()
                break
            except PositionConflict:
                pass
        assert not any(tensor.any() for tensor in session.state().values())
    with client.session("vowels") as session, pytest.raises(CannotRollOut, match="vowels"):
        next(session.rollout_stream([0.0] * 12, 5))
    with client.session("characters") as session, pytest.raises(InvalidInput, match="steps"):
        next(session.rollout_stream("Alice", 0))


def test_lost_answers_are_requested_again_and_a_client_that_gave_up_may_continue(
    server: Server, client: Client
) -> None:
    text = whole(client, 60)
    proxy = FaultyProxy(server.url)
    with Client(proxy.url, timeout=SHORT, retry=QUICK) as mine, mine.session("characters") as session:
        proxy.faults.extend(["lose", "cut", "busy", "cut", "bad gateway", "lose"])
        with session.rollout_stream("Alice was", 60, **ASKED) as letters:
            assert "".join(one.label or "" for one in letters) == text
        assert not proxy.faults and session.position == session.refresh() == 68

    async def other_form() -> str:
        async with AsyncClient(proxy.url, timeout=SHORT, retry=QUICK) as mine, mine.session("characters") as session:
            proxy.faults.extend(["cut", "lose"])
            return "".join([one.label or "" async for one in session.rollout_stream("Alice was", 60, **ASKED)])

    assert asyncio.run(other_form()) == text
    with Client(proxy.url) as mine, mine.session("characters", keep=True) as session:
        mine._transport.retry = type(QUICK)(attempts=2, first=0.01)
        proxy.faults.extend(["lose"] * 2)
        letters = session.rollout_stream("Alice was", 60, **ASKED)
        with pytest.raises(RetriesExhausted):
            next(letters)
        assert "".join(one.label or "" for one in letters) == text
        session.delete()
    proxy.close()


@pytest.mark.long
def test_every_output_comes_once_while_the_server_is_killed(examples: Path, serve: Serve, redis: RedisServer) -> None:
    with killed_again_and_again(examples, serve, redis) as (url, is_over), Client(url, retry=QUICK) as client:
        texts: set[str] = set()
        while not is_over() or not texts:
            with client.session("characters") as session:
                texts.add("".join(one.label or "" for one in session.rollout_stream("Alice was", 700, **ASKED)))
        assert texts == {whole(client, 700)}
