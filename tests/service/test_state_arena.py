"""The arena: rows never mix, and what is freed is never seen again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from cellserve.models.signature import Signature, StateSpec, TensorSpec
from cellserve.service.engine.device_arena import DeviceArena
from cellserve.service.engine.memory import resident_bytes
from cellserve.service.engine.state_arena import Arena
from cellserve.service.runtime.onnx_model import Runtime, RuntimeOptions
from tests import foreign
from tests.foreign import Info

MakeArena = Callable[[int], Arena]

SPECS = (
    StateSpec(name="h", next_name="h.next", shape=(3,)),
    StateSpec(name="c", next_name="c.next", shape=(2, 2), batch_axis=1),
)


def on_device(limit: int) -> DeviceArena:
    """An arena whose states are in a device's memory, as far as there is one here."""
    shapes: dict[str, list[Any]] = {"x": ["batch"], "h": ["batch", 3], "c": [2, "batch", 2]}
    following = {"x": "y", "h": "h.next", "c": "c.next"}
    passed_on = [helper.make_node("Identity", [name], [following[name]]) for name in shapes]
    told: list[Info] = [(name, 1, shape) for name, shape in shapes.items()]
    given: list[Info] = [(following[name], 1, shape) for name, shape in shapes.items()]
    x, y = TensorSpec(name="x", shape=()), TensorSpec(name="y", shape=())
    signature = Signature(inputs=(x,), outputs=(y,), states=SPECS, lengths=None, time_axis=False)
    content = foreign.described(foreign.model(passed_on, told, given), signature)
    runtime = Runtime(content, RuntimeOptions(provider="cpu", state_memory="device"))
    assert runtime.on_device is not None
    return DeviceArena(SPECS, limit, runtime.on_device.tables())


ARENAS = pytest.mark.parametrize("make_arena", [partial(Arena, SPECS), on_device], ids=["host", "device"])


@ARENAS
@given(acts=st.lists(st.one_of(st.just("take"), st.tuples(st.just("give"), st.integers(0, 1000))), max_size=300))
def test_a_new_slot_is_zero_and_others_keep_what_they_have(make_arena: MakeArena, acts: list) -> None:
    arena = make_arena(100)
    held: dict[int, float] = {}
    for number, act in enumerate(acts, start=1):
        if act == "take":
            slot = arena.allocate()
            if slot is None:
                assert len(held) == 100
                continue
            assert slot not in held
            assert all((state == 0).all() for state in arena.read(slot).values())
            arena.write(slot, {"h": np.full(3, number), "c": np.full((2, 2), number)})
            held[slot] = number
        elif held:
            slot = sorted(held)[act[1] % len(held)]
            arena.release(np.array([slot]))
            del held[slot]
        assert arena.in_use == len(held)
    for slot, value in held.items():
        assert all((state == value).all() for state in arena.read(slot).values())


@ARENAS
def test_growing_keeps_states_positions_and_holds(make_arena: MakeArena) -> None:
    arena = make_arena(1000)
    first = arena.allocate()
    assert first is not None
    arena.write(first, {"h": np.arange(3), "c": np.ones((2, 2))})
    arena.position[first], arena.last_used[first], arena.locked[first] = 7, 1.5, True
    capacity = arena.capacity
    slots = arena.allocate_many(500)
    assert slots is not None
    assert first not in slots
    assert arena.capacity > capacity
    assert arena.read(first)["h"].tolist() == [0, 1, 2]
    assert (arena.position[first], arena.last_used[first], arena.locked[first]) == (7, 1.5, True)
    assert np.isinf(arena.last_used[slots]).all()
    assert arena.allocate_many(1000) is None
    assert arena.in_use == 501


def test_gather_and_scatter_put_the_batch_where_the_model_has_it() -> None:
    arena = Arena(SPECS, 10)
    slots = arena.allocate_many(3)
    assert slots is not None
    states = [np.arange(9.0).reshape(3, 3), np.arange(12.0).reshape(2, 3, 2)]
    arena.scatter(slots, states)
    back = arena.gather(slots)
    assert [state.shape for state in back] == [(3, 3), (2, 3, 2)]
    assert all((one == other).all() for one, other in zip(back, states, strict=True))
    assert (arena.read(int(slots[1]))["c"] == states[1][:, 1]).all()
    other = arena.allocate_many(1)
    assert other is not None
    arena.copy(slots[:1], other)
    assert (arena.read(int(other[0]))["c"] == states[1][:, 0]).all()


@pytest.mark.parametrize(("shape", "axis"), [((5,), 0), ((5,), 1), ((2, 5), 1), ((2, 5), 2), ((2, 3, 4), 2), ((), 0)])
def test_rows_are_gathered_and_scattered_along_the_batch_axis(shape: tuple[int, ...], axis: int) -> None:
    spec = StateSpec(name="s", next_name="s.next", shape=shape, batch_axis=axis)
    arena = Arena((spec,), 100)
    taken = arena.allocate_many(20)
    assert taken is not None
    true = np.random.default_rng(1).normal(size=(20, *shape)).astype(np.float32)
    slots = np.random.default_rng(2).permutation(taken)[:7]
    arena.scatter(taken, [np.moveaxis(true, 0, axis)])
    (rows,) = arena.gather(slots)
    assert rows.flags.c_contiguous
    assert rows.shape == (*shape[:axis], 7, *shape[axis:])
    assert (np.moveaxis(rows, axis, 0) == true[slots]).all()
    arena.scatter(slots, [rows + 1])
    changed = np.stack([arena.read(int(slot))["s"] for slot in taken]) - true
    assert (changed[slots].round() == 1).all()
    assert (np.delete(changed, slots, 0) == 0).all()


def test_slots_that_are_free_give_their_memory_back_and_stay_zeros() -> None:
    spec = StateSpec(name="h", next_name="h.next", shape=(1024,))
    arena = Arena((spec,), 30_000)
    kept = arena.allocate_many(3)
    burst = arena.allocate_many(20_000)
    assert kept is not None
    assert burst is not None
    arena.scatter(kept, [np.full((3, 1024), 7.0)])
    last = burst[-1:].copy()
    before = resident_bytes()
    arena.scatter(burst, [np.full((1, 1024), 1.0)])
    assert resident_bytes() - before > 70e6
    arena.release(burst[:-1])
    while arena.trim():
        pass
    assert resident_bytes() - before < 10e6
    assert not arena.trim()
    assert (arena.gather(kept)[0] == 7).all()
    assert (arena.gather(last)[0] == 1).all()
    again = arena.allocate_many(20_000)
    assert again is not None
    assert not set(again.tolist()) & {*kept.tolist(), *last.tolist()}
    assert not arena.gather(again)[0].any()


def test_a_state_that_is_looked_at_does_not_keep_the_arena_from_growing() -> None:
    arena = Arena(SPECS, 1000)
    slot = arena.allocate()
    assert slot is not None
    arena.write(slot, {"h": np.arange(3), "c": np.ones((2, 2))})
    view = arena._arrays[0][:]
    assert arena.allocate_many(500) is not None
    assert arena.read(slot)["h"].tolist() == [0, 1, 2] == view[slot].tolist()


def test_slots_on_a_device_share_rows_until_one_of_them_moves() -> None:
    arena = on_device(100)
    slots = arena.allocate_many(4)
    assert slots is not None
    arena.write(int(slots[0]), {"h": np.arange(3), "c": np.ones((2, 2))})
    arena.copy(slots[[0, 0]], slots[1:3])
    assert arena.rows == 1
    batch = arena.gather(slots[[0, 3]])
    _, finite = batch.run(np.zeros((2, 1), np.float32), np.ones(2, np.int32))
    assert finite.all()
    arena.scatter_rows(slots[[0, 3]], batch, [0])
    arena.done(batch)
    assert arena.rows == 2, "the row that the batch did not keep was not given back"
    assert [arena.read(int(slot))["h"].tolist() for slot in slots] == [[0, 1, 2]] * 3 + [[0, 0, 0]]
    arena.release(slots[[0, 1]])
    assert arena.read(int(slots[2]))["h"].tolist() == [0, 1, 2]
    arena.release(slots[2:])
    assert arena.rows == 0
    assert not arena.read(int(arena.allocate_many(1)[0]))["h"].any()  # type: ignore[index]
