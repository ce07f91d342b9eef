"""States that stay on the device that runs a model: the same bits, in place, and nothing but x and y between."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from cellserve.models.signature import Signature, StateSpec, TensorSpec
from cellserve.service.engine.device_arena import DeviceArena
from cellserve.service.engine.memory import resident_bytes
from cellserve.service.runtime.batch_invariance import QUICK_PLAN, check_batch_invariance, random_inputs
from cellserve.service.runtime.onnx_model import Runtime, RuntimeOptions
from cellserve.service.runtime.shape_policy import POLICIES
from cellserve.service.runtime.state_tables import RESERVED, ZEROS, StateTables
from tests import foreign
from tests.kinds import BOTH_WAYS, KINDS

ON_DEVICE = RuntimeOptions(provider="cpu", state_memory="device")


def delay_line(opset: int = 17) -> bytes:
    """`y = s`, `s.next = x`: the next state needs nothing of the one before."""
    made = foreign.model(
        [helper.make_node("Identity", ["s"], ["y"]), helper.make_node("Identity", ["x"], ["s.next"])],
        [("x", 1, ["batch", 3]), ("s", 1, ["batch", 3])],
        [("y", 1, ["batch", 3]), ("s.next", 1, ["batch", 3])],
        opset,
    )
    signature = Signature(
        inputs=(TensorSpec(name="x", shape=(3,)),),
        outputs=(TensorSpec(name="y", shape=(3,)),),
        states=(StateSpec(name="s", next_name="s.next", shape=(3,)),),
        lengths=None,
        time_axis=False,
    )
    return foreign.described(made, signature)


MODELS = {kind: foreign.described(*made) for kind, made in KINDS.items()}
MODELS |= {"delay": delay_line(), "delay-opset-11": delay_line(11)}


def tables_of(content: bytes, capacity: int = RESERVED) -> tuple[Runtime, StateTables]:
    runtime = Runtime(content, ON_DEVICE)
    assert runtime.on_device is not None
    return runtime, runtime.on_device.tables(capacity)


@pytest.mark.parametrize("policy", [None, *POLICIES[1:]], ids=lambda policy: policy.name if policy else "as it is")
@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_gives_the_bits_that_it_gives_with_states_in_host_memory(kind: str, policy: object) -> None:
    runtimes = Runtime(MODELS[kind]), Runtime(MODELS[kind], ON_DEVICE)
    assert runtimes[1].on_device is not None
    for runtime in runtimes:
        if policy is not None and runtime.signature.batch is None:
            runtime.shapes = policy  # type: ignore[assignment]
    rng = np.random.default_rng(1)
    for rows, steps in ((1, 1), (3, 1), (5, 6)):
        x, states = random_inputs(runtimes[0].signature, rows, steps, rng)
        lengths = rng.integers(1, steps + 1, rows).astype(np.int32)
        (y, final), (own_y, own_final) = (runtime.run(x, lengths, states) for runtime in runtimes)
        for row, length in enumerate(lengths):
            assert own_y[row, :length].tobytes() == y[row, :length].tobytes()
        assert [state.tobytes() for state in own_final] == [state.tobytes() for state in final]
        assert [state.shape for state in own_final] == [state.shape for state in final]


@pytest.mark.parametrize("kind", ["deep", "symbols", "lstm"])
def test_the_proof_of_batch_invariance_is_made_on_the_tables(kind: str) -> None:
    exactness = check_batch_invariance([Runtime(MODELS[kind], ON_DEVICE)], QUICK_PLAN)
    assert exactness.proved, exactness.why


def test_a_model_that_cannot_be_stepped_has_no_tables() -> None:
    runtime = Runtime(foreign.described(foreign.both_ways(), BOTH_WAYS), ON_DEVICE)
    assert runtime.on_device is None
    assert runtime.run(np.zeros((1, 4, 3), np.float32), np.full(1, 4, np.int32), [])[0].shape == (1, 4, 8)


def test_a_run_writes_the_targets_in_place_and_no_other_row() -> None:
    runtime, tables = tables_of(MODELS["lstm"], 5000)
    rng = np.random.default_rng(2)
    x, states = random_inputs(runtime.signature, 5000 - RESERVED, 1, rng)
    rows = np.arange(RESERVED, 5000)
    tables.write(rows, [np.moveaxis(state, 1, 0) for state in states])
    before, memory = tables.read(np.arange(5000)), [value.data_ptr() for value in tables._values]
    sources, targets = np.array([7, 8, ZEROS]), np.array([100, 4999, 101])
    y, finite = tables.run(x[:3], np.ones(3, np.int32), sources, targets)
    assert finite.all()
    assert [value.data_ptr() for value in tables._values] == memory
    after = tables.read(np.arange(5000))
    others = np.setdiff1d(np.arange(5000), targets)
    for old, new in zip(before, after, strict=True):
        assert new[others].tobytes() == old[others].tobytes()
        assert not new[ZEROS].any()
    true_y, final = Runtime(MODELS["lstm"]).run(
        x[:3], np.ones(3, np.int32), [np.moveaxis(state[sources], 0, 1).copy() for state in before]
    )
    assert y.tobytes() == true_y.tobytes()
    assert [new[targets].tobytes() for new in after] == [np.moveaxis(s, 1, 0).tobytes() for s in final]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_rows_whose_next_states_are_not_finite_are_reported(bad: float) -> None:
    _, tables = tables_of(MODELS["delay"], 8)
    x = np.ones((3, 2, 3), np.float32)
    x[1, 1, 2] = bad
    _, finite = tables.run(x, np.array([2, 2, 1], np.int32), np.full(3, ZEROS), np.array([3, 4, 5]))
    assert finite.tolist() == [True, False, True]


def test_tables_that_grow_under_a_run_lose_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tables = tables_of(MODELS["delay"], 8)
    begun, go_on = threading.Event(), threading.Event()
    runs = ort.InferenceSession.run_with_iobinding

    def held_up(session: ort.InferenceSession, binding: ort.IOBinding, *more: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(30)
        runs(session, binding, *more)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", held_up)
    x = np.full((1, 1, 3), 7, np.float32)
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(tables.run, x, np.ones(1, np.int32), np.array([ZEROS]), np.array([5]))
        assert begun.wait(30)
        threading.Timer(0.05, go_on.set).start()
        tables.resize(np.r_[np.arange(8), np.zeros(92, np.int64)])
        assert run.done() or go_on.is_set()
        run.result()
    assert tables.capacity == 100
    assert tables.read(np.array([5, 99]))[0].tolist() == [[7, 7, 7], [0, 0, 0]]


def test_memory_that_a_burst_of_sessions_took_is_given_back() -> None:
    made, signature = foreign.elementwise("Abs", 4096)
    runtime, tables = tables_of(foreign.described(made, signature))
    arena = DeviceArena(runtime.signature.states, 20_000, tables)
    before = resident_bytes()
    kept, burst = arena.allocate_many(3), arena.allocate_many(10_000)
    assert kept is not None and burst is not None
    assert resident_bytes() - before < 16e6, "slots that were not stepped took rows"
    for slots in (*np.split(burst, 50), kept):
        batch = arena.gather(slots)
        batch.run(np.ones((len(slots), 1, 4096), np.float32), np.ones(len(slots), np.int32))
        arena.scatter(slots, batch)
        arena.done(batch)
    states = [arena.read(int(slot)) for slot in kept]
    assert resident_bytes() - before > 100e6
    arena.release(burst)
    arena.trim()  # which first learns that the burst is over
    arena.trim()
    assert resident_bytes() - before < 50e6
    for slot, before_trim in zip(kept, states, strict=True):
        assert all(state.any() and (state == before_trim[name]).all() for name, state in arena.read(int(slot)).items())
    assert arena.rows == 3
