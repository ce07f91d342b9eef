"""The locks of sessions: first in, first out over all sessions at once, whoever is cancelled or deleted meanwhile."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from cellserve.models.signature import StateSpec
from cellserve.service.engine.state_arena import Arena, Slots
from cellserve.service.sessions.locks import Lease, SessionLocks


class Session:
    """What the lock knows of a session."""

    def __init__(self, slot: int) -> None:
        self.slot, self.slots, self.alive = slot, np.array([slot]), True


class World:
    """Three sessions, and who has acquired what, in order."""

    def __init__(self) -> None:
        self.arena = Arena((StateSpec(name="s", next_name="s.next", shape=(1,)),), 8)
        slots = self.arena.allocate_many(3)
        assert slots is not None
        self.sessions = [Session(slot) for slot in slots.tolist()]
        self.locks = SessionLocks(self.arena)
        self.order: list[str] = []

    def slots(self, *places: int) -> Slots:
        return np.array([self.sessions[place].slot for place in places])

    async def start(self, name: str, *places: int) -> asyncio.Task[None]:
        """Starts to acquire the locks of some sessions, and lets everything run that can."""

        async def acquire() -> None:
            await self.locks.acquire([self.sessions[place] for place in places], self.slots(*places))
            self.order.append(name)

        task = asyncio.create_task(acquire())
        await settle()
        return task

    async def release(self, *places: int) -> None:
        self.locks.release(self.slots(*places))
        await settle()

    def locked(self) -> list[bool]:
        return [self.locks.is_locked(session.slot) for session in self.sessions]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def in_a_loop(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Runs a test in an event loop of its own."""

    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test(World()))

    del run.__wrapped__  # pytest would look for a fixture named as the argument
    return run


@in_a_loop
async def test_a_free_lock_is_acquired_at_once(world: World) -> None:
    assert world.locks.try_acquire(world.slots(0, 1))
    assert world.locked() == [True, True, False]
    world.locks.release(world.slots(0, 1))
    assert world.locked() == [False] * 3


@in_a_loop
async def test_trying_acquires_all_of_several_locks_or_none(world: World) -> None:
    world.locks.lock(world.sessions[1].slot)
    assert not world.locks.try_acquire(world.slots(0, 1, 2))
    assert world.locked() == [False, True, False]


@in_a_loop
async def test_waiters_are_served_first_in_first_out(world: World) -> None:
    for name in ("a", "b", "c"):
        await world.start(name, 0)
    assert world.order == ["a"]
    await world.release(0)
    assert world.order == ["a", "b"]
    await world.release(0)
    assert world.order == ["a", "b", "c"]
    assert world.locks.contended == 1
    await world.release(0)
    assert world.locked() == [False] * 3
    assert world.locks.contended == 0


@in_a_loop
async def test_a_lock_is_passed_on_without_being_free_in_between(world: World) -> None:
    await world.start("a", 0)
    await world.start("b", 0)
    world.locks.release(world.slots(0))
    assert not world.locks.try_acquire(world.slots(0))


@in_a_loop
async def test_whoever_needs_several_locks_holds_the_free_ones_while_it_waits(world: World) -> None:
    await world.start("a", 0)
    await world.start("several", 0, 1, 2)
    assert world.locked() == [True] * 3
    await world.start("c", 2)
    await world.release(0)
    assert world.order == ["a", "several"]
    await world.release(0, 1, 2)
    assert world.order == ["a", "several", "c"]


@in_a_loop
async def test_acquiring_the_same_locks_in_opposite_orders_does_not_deadlock(world: World) -> None:
    await world.start("holder", 0, 1, 2)
    await world.start("forwards", 0, 1, 2)
    await world.start("backwards", 2, 1, 0)
    await world.start("middle", 1)
    await world.release(0, 1, 2)
    assert world.order == ["holder", "forwards"]
    await world.release(2, 1, 0)
    assert world.order == ["holder", "forwards", "backwards"]
    await world.release(0, 1, 2)
    assert world.order[-1] == "middle"
    await world.release(1)
    assert world.locked() == [False] * 3
    assert world.locks.contended == 0


@in_a_loop
async def test_a_circle_of_overlapping_pairs_is_served_in_order_of_arrival(world: World) -> None:
    for name, places in (("01", (0, 1)), ("12", (1, 2)), ("20", (2, 0)), ("10", (1, 0))):
        await world.start(name, *places)
    assert world.order == ["01"]
    await world.release(0, 1)
    assert world.order == ["01", "12"]
    await world.release(1, 2)
    assert world.order == ["01", "12", "20"]
    await world.release(2, 0)
    assert world.order == ["01", "12", "20", "10"]


@in_a_loop
async def test_a_cancelled_waiter_leaves_the_queue_and_gives_back_what_it_held(world: World) -> None:
    await world.start("a", 0)
    cancelled = await world.start("cancelled", 0, 1)
    await world.start("c", 0)
    await world.start("d", 1)
    cancelled.cancel()
    await settle()
    assert world.order == ["a", "d"]
    await world.release(0)
    assert world.order == ["a", "d", "c"]


@in_a_loop
async def test_a_waiter_cancelled_as_it_is_woken_passes_the_lock_on(world: World) -> None:
    await world.start("a", 0)
    woken = await world.start("woken", 0)
    await world.start("c", 0)
    world.locks.release(world.slots(0))
    woken.cancel()
    await settle()
    assert world.order == ["a", "c"]


@in_a_loop
async def test_discarding_a_lock_wakes_all_who_wait_for_it(world: World) -> None:
    await world.start("a", 0)
    await world.start("b", 0)
    await world.start("c", 0)
    world.sessions[0].alive = False
    world.locks.discard(world.sessions[0].slot)
    await settle()
    assert world.order == ["a", "b", "c"]
    assert world.locked() == [False] * 3
    assert world.locks.contended == 0


@in_a_loop
async def test_after_a_discard_a_waiter_still_waits_for_its_other_locks(world: World) -> None:
    await world.start("a", 0)
    await world.start("b", 1)
    await world.start("both", 0, 1)
    world.sessions[0].alive = False
    world.locks.discard(world.sessions[0].slot)
    await settle()
    assert world.order == ["a", "b"]
    await world.release(1)
    assert world.order == ["a", "b", "both"]


@in_a_loop
async def test_a_cancelled_waiter_does_not_touch_the_slot_of_an_ended_session(world: World) -> None:
    await world.start("a", 0)
    await world.start("b", 1)
    both = await world.start("both", 0, 1)
    world.sessions[0].alive = False
    world.locks.discard(world.sessions[0].slot)
    world.locks.lock(world.sessions[0].slot)  # the slot's next session
    both.cancel()
    await settle()
    assert world.locked() == [True, True, False]


@pytest.mark.parametrize("handed_over", [False, True])
def test_the_context_manager_releases_unless_the_lock_is_handed_over(handed_over: bool) -> None:
    async def scenario() -> None:
        world, lease = World(), Lease()
        async with world.locks.locked(world.sessions[0], lease):
            assert world.locked() == [True, False, False]
            if handed_over:
                lease.hand_over()
        assert world.locked() == [handed_over, False, False]

    asyncio.run(scenario())


@in_a_loop
async def test_the_context_manager_releases_when_its_block_fails(world: World) -> None:
    with pytest.raises(RuntimeError):
        async with world.locks.locked(world.sessions[0]):
            raise RuntimeError
    assert world.locked() == [False] * 3


@in_a_loop
async def test_the_context_manager_does_not_release_the_slot_of_an_ended_session(world: World) -> None:
    async with world.locks.locked(world.sessions[0]):
        world.sessions[0].alive = False
        world.locks.discard(world.sessions[0].slot)
        world.locks.lock(world.sessions[0].slot)  # the slot's next session
    assert world.locked() == [True, False, False]
