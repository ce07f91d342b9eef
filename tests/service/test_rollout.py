"""Rollouts that fail, are left or meet others: nothing is applied that should not be, and nothing stays held."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from cellserve.service.engine.engine import Engine
from cellserve.service.errors import NotFinite, PositionConflict, SessionGone
from cellserve.service.sessions.rollout import Rollout, RolloutRunner
from cellserve.service.sessions.stores.memory import MemoryStore
from cellserve.service.sessions.writer import SessionWriter
from tests.service.helpers import halving

Make = Callable[..., tuple[Engine, MemoryStore, SessionWriter]]
# The model's value grows by a half each time: 518 becomes 777, at which it gives infinity.
FAILING = np.full((1, 2), 518, np.float32)


def run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test in an event loop of its own."""

    @functools.wraps(test)
    def whole(*given: Any, **named: Any) -> None:
        asyncio.run(test(*given, **named))

    return whole


def asked(x: np.ndarray, steps: int, streamed: bool = False) -> Rollout:
    return Rollout(x, steps, None, streamed)


def check_all_is_left(engine: Engine, store: MemoryStore, writer: SessionWriter) -> None:
    assert not engine.arena.locked.any()
    assert not writer.in_flight
    assert engine.arena.in_use == len(store.table.live)
    assert engine.queued == 0


@pytest.mark.parametrize("position", [None, 0])
@run
async def test_a_rollout_that_fails_on_its_way_has_applied_nothing(make: Make, position: int | None) -> None:
    engine, store, writer = make()
    session, _ = store.create_now(engine, None)
    with pytest.raises(NotFinite):
        await RolloutRunner(writer).run(session, asked(FAILING, 3), position)
    assert session.position == 0
    assert not engine.arena.read(session.slot)["s"].any()
    check_all_is_left(engine, store, writer)


@run
async def test_a_stream_that_fails_keeps_what_it_has_given(make: Make) -> None:
    engine, store, writer = make()
    session, _ = store.create_now(engine, None)
    given: list[Any] = []
    with pytest.raises(NotFinite):
        async for one in RolloutRunner(writer).stream(session, asked(FAILING, 3, True), 0, None):
            given.append(one)
    assert [(one.position, one.x.tolist()) for one in given] == [(1, [518.0] * 2), (2, [777.0] * 2)]
    assert session.position == 2
    check_all_is_left(engine, store, writer)


@run
async def test_a_rollout_that_nobody_waits_for_any_more_has_applied_nothing(make: Make) -> None:
    engine, store, writer = make()
    session, _ = store.create_now(engine, None)
    work = asyncio.create_task(RolloutRunner(writer).run(session, asked(np.ones((1, 2), np.float32), 4000), 0))
    async with asyncio.timeout(60):
        while len(halving(engine).runs) < 20:
            await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    await writer.submit(session, np.ones((1, 2), np.float32), True)
    assert session.position == 1
    assert engine.arena.read(session.slot)["s"].tolist() == [1, 1]
    check_all_is_left(engine, store, writer)


@run
async def test_a_session_of_another_history_is_not_gone_on_with(make: Make) -> None:
    engine, store, writer = make()
    session, _ = store.create_now(engine, None)
    async with aclosing(
        RolloutRunner(writer).stream(session, asked(np.ones((1, 2), np.float32), 5, True), 0, None)
    ) as stream:
        await anext(stream)
        session.applied = None  # as where a store has lost writer, and others have come to the same position
        with pytest.raises(PositionConflict):
            await anext(stream)
    assert session.position == 1
    check_all_is_left(engine, store, writer)


@run
async def test_a_session_may_be_deleted_between_two_events(make: Make) -> None:
    engine, store, writer = make()
    session, _ = store.create_now(engine, None)
    async with aclosing(
        RolloutRunner(writer).stream(session, asked(np.ones((1, 2), np.float32), 5, True), None, None)
    ) as stream:
        await anext(stream)
        await store.delete("", session.id)
        with pytest.raises(SessionGone):
            await anext(stream)
    check_all_is_left(engine, store, writer)
