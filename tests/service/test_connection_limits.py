"""The bounds of connections: their number, their time limits, and a client's turns."""

from __future__ import annotations

import asyncio
import functools
import resource
import time
from collections.abc import Callable, Coroutine

import pytest

from cellserve.service.api.connections import limits
from cellserve.service.api.connections.limits import TURN_SECONDS, Client, ConnectionTable, Phase, Place, Progress
from cellserve.service.observability.counters import Counts
from cellserve.service.settings import Settings


def in_a_loop(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    """Makes a test of a coroutine."""

    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


class Held:
    """A connection that waits."""

    sender: Client
    place: Place
    seen: tuple[Progress, float] | None = None

    def __init__(self, phase: Phase = Phase.NOTHING) -> None:
        self.state = Progress(phase)
        self.turns = 0
        self.given_up: Phase | None = None

    def go_on(self) -> None:
        self.turns += 1
        self.sender.spent += TURN_SECONDS
        self.sender.wait(self)

    def progress(self) -> Progress:
        return self.state

    def give_up(self, phase: Phase) -> None:
        self.given_up = phase


def table(**settings: float) -> ConnectionTable:
    return ConnectionTable(Settings(**settings), Counts())  # type: ignore[arg-type]


async def entered(connections: ConnectionTable, host: str, count: int = 1) -> list[Held]:
    held = [Held() for _ in range(count)]
    for one in held:
        connections.enter(one, (host, 1))
    return held


@in_a_loop
async def test_a_clients_connections_take_turns_and_leave_the_loop_to_others() -> None:
    connections = table()
    mine, same, other = await entered(connections, "10.0.0.1", 2) + await entered(connections, "10.0.0.2")
    assert mine.sender is same.sender is not other.sender
    assert mine.sender.is_in_turn()
    mine.sender.wait(mine)
    mine.sender.wait(same)
    assert not mine.sender.is_in_turn() and other.sender.is_in_turn()
    for _ in range(10):
        await asyncio.sleep(0)
    assert mine.turns == same.turns == 5


@in_a_loop
async def test_a_turn_lasts_for_an_iteration_of_the_loop_however_long_that_is() -> None:
    [one] = await entered(table(), "10.0.0.1")
    one.sender.spent += TURN_SECONDS
    for _ in range(3):
        assert not one.sender.is_in_turn()
        time.sleep(0.002)  # the time of neither asyncio's loop nor uvloop's stands still meanwhile
    await asyncio.sleep(0)
    assert one.sender.is_in_turn()


@in_a_loop
async def test_places_are_limited_by_client_and_in_all() -> None:
    connections = table(max_connections=10, max_connections_per_client=3)
    first = await entered(connections, "10.0.0.1", 8)
    assert [one.place for one in first] == [Place.ORDINARY] * 3 + [Place.SPARE] * 4 + [Place.NONE]
    others = [await entered(connections, f"10.0.1.{number}") for number in range(7)]
    assert {one.place for [one] in others} == {Place.ORDINARY}
    [late] = await entered(connections, "10.0.2.1")
    assert late.place is Place.SPARE
    for one in (first[0], late):
        connections.leave(one, one.sender)
    [late] = await entered(connections, "10.0.2.1")
    assert late.place is Place.ORDINARY


@in_a_loop
async def test_a_trusted_proxy_has_no_limit_of_its_own() -> None:
    connections = ConnectionTable(Settings(trusted_proxies="10.0.0.1", max_connections_per_client=1), Counts())
    assert {one.place for one in await entered(connections, "10.0.0.1", 5)} == {Place.PROXY}


@in_a_loop
async def test_a_request_that_stops_arriving_is_given_up_and_a_slow_one_is_not() -> None:
    connections = table(head_seconds=0.6, body_seconds=0.6)
    head, body, work, going = await entered(connections, "10.0.0.1", 4)
    head.state, body.state = Progress(Phase.HEAD), Progress(Phase.BODY)
    for turn in range(12):
        going.state = Progress(Phase.BODY, None, turn * 64 * 1024)
        body.state = Progress(Phase.BODY, None, turn)  # too slow
        await asyncio.sleep(0.1)
    assert [one.given_up for one in (head, body, work, going)] == [Phase.HEAD, Phase.BODY, None, None]


def test_open_files_limit_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (600, 600))
    assert limits.affordable_connections(Settings(max_connections=10_000)) == 280
    assert limits.affordable_connections(Settings(max_connections=10)) == 10
    assert limits.affordable_connections(Settings(grpc_port=0)) == 140
