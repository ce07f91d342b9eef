"""The engine: whoever is in a tick, each gets what one run over its own sequence gives, and only the guilty fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.pending_sequence import start_sequence
from cellserve.service.errors import (
    BodyTooLarge,
    InvalidInput,
    ModelFailed,
    NotFinite,
    QueueFull,
    SessionGone,
    StoreUnavailable,
)
from cellserve.service.sessions.stores.memory import MemoryStore
from cellserve.service.sessions.writer import SessionWriter
from tests.budgets import examples
from tests.service.helpers import BROKEN, INFINITE, OUTSIDE, halving, machinery, truth

Make = Callable[..., tuple[Engine, MemoryStore, SessionWriter]]

any_make = settings(max_examples=examples(20, 400), suppress_health_check=[HealthCheck.function_scoped_fixture])


def drawn(steps: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(steps, 2)).astype(np.float32)


async def turns() -> None:
    """Lets the event loop turn so often that whatever can begin has begun."""
    for _ in range(50):
        await asyncio.sleep(0)


@any_make
@given(
    sequences=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=12),
    max_batch=st.integers(1, 8),
    quantum=st.integers(1, 16),
    costly=st.booleans(),
)
def test_any_chunks_in_any_company_give_the_bits_of_one_run(
    make: Make, sequences: list[list[int]], max_batch: int, quantum: int, costly: bool
) -> None:
    engine, store, writer = make(max_batch=max_batch, quantum=quantum, step_seconds=1e-2 if costly else 1e-6)

    async def client(number: int, chunks: list[int]) -> None:
        x = drawn(sum(chunks), number)
        session, done, ys = store.create_now(engine, None)[0], 0, []
        for chunk in chunks:
            y, position = (await writer.submit(session, x[done : done + chunk], True))[:2]
            done += chunk
            assert position == done
            ys.append(y)
        assert np.concatenate(ys).tobytes() == truth(x).tobytes()
        await store.delete("", session.id)

    async def everyone() -> None:
        await asyncio.gather(*(client(number, chunks) for number, chunks in enumerate(sequences)))

    asyncio.run(everyone())
    assert engine.queued == 0
    assert engine.arena.in_use == 0
    runs = halving(engine).runs
    assert max(rows for rows, _ in runs) <= max(1, max_batch)
    assert max(steps for _, steps in runs) <= quantum
    counts = engine.counts
    assert counts.steps == sum(map(sum, sequences))
    assert counts.steps + counts.padding == sum(rows * steps for rows, steps in runs)
    assert (sum(counts.rows.read()[0]), counts.rows.read()[1]) == (len(runs), sum(rows for rows, _ in runs))
    assert sum(counts.run.read()[0]) == len(runs)
    assert sum(counts.queue.read()[0]) == sum(rows for rows, _ in runs)
    assert (counts.rerun, counts.failed) == (0, 0)


def test_what_waits_together_runs_together(make: Make) -> None:
    engine, store, writer = make()

    async def scenario() -> None:
        sessions = [store.create_now(engine, None)[0] for _ in range(50)]
        await asyncio.gather(*(writer.submit(session, drawn(1, 0), True) for session in sessions))

    asyncio.run(scenario())
    assert halving(engine).runs == [(50, 1)]


def test_a_store_that_fails_at_once_fails_its_steps_and_nothing_else(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, store, writer = make()

    def broken(*_: Any) -> None:
        raise OSError("no space left")

    async def scenario() -> None:
        session = store.create_now(engine, None)[0]
        with monkeypatch.context() as patch:
            patch.setattr(writer, "commit", broken)
            with pytest.raises(StoreUnavailable):
                await writer.submit(session, drawn(1, 0), True)
        assert (await writer.submit(session, drawn(1, 0), True)).y.tobytes()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert engine.queued == 0


def test_an_answer_that_cannot_be_made_fails_its_own_work_and_nothing_else(make: Make) -> None:
    engine, store, writer = make()
    told: list[Any] = []

    def answer(*outcome: Any) -> None:
        told.append(outcome[-1])
        if not isinstance(outcome[-1], Exception):
            raise IndexError("no such label")

    async def scenario() -> None:
        session = store.create_now(engine, None)[0]
        assert writer.try_submit(session, drawn(1, 0), True, None, answer)
        start_sequence(engine, drawn(1, 0), True, False, answer)
        others = [writer.submit(store.create_now(engine, None)[0], drawn(1, 0), True) for _ in range(2)]
        await asyncio.wait_for(asyncio.gather(*others), 30)

    asyncio.run(scenario())
    assert [type(one) for one in told if isinstance(one, Exception)] == [IndexError, IndexError]
    assert len(told) == 4 and engine.queued == 0 and halving(engine).runs == [(4, 1)]
    assert engine.arena.in_use == 3


def test_a_model_that_is_not_exact_runs_one_row_and_one_step_at_a_time(make: Make) -> None:
    engine, store, writer = make(exact=False)

    async def scenario() -> None:
        sessions = [store.create_now(engine, None)[0] for _ in range(3)]
        await asyncio.gather(*(writer.submit(session, drawn(4, 0), True) for session in sessions))

    asyncio.run(scenario())
    assert set(halving(engine).runs) == {(1, 1)}


@pytest.mark.parametrize(("poison", "problem"), [(BROKEN, ModelFailed), (INFINITE, NotFinite), (OUTSIDE, InvalidInput)])
@pytest.mark.parametrize("costly", [False, True])
def test_a_poisoned_step_fails_alone_and_moves_nothing(
    make: Make, poison: float, problem: type[Exception], costly: bool
) -> None:
    engine, store, writer = make(step_seconds=1e-2 if costly else 1e-6, quantum=4)
    x = drawn(10, 1)
    bad = x.copy()
    bad[7, 1] = poison

    async def scenario() -> None:
        guilty = store.create_now(engine, None)[0]
        others = [store.create_now(engine, None)[0] for _ in range(5)]
        await writer.submit(guilty, x[:3], True)
        results: list[Any] = await asyncio.gather(
            writer.submit(guilty, bad, True),
            *(writer.submit(other, x, True) for other in others),
            return_exceptions=True,
        )
        failure = results[0]
        assert isinstance(failure, problem)
        if isinstance(failure, NotFinite):
            assert failure.extensions["step"] == 7
        for result in results[1:]:
            assert result[0].tobytes() == truth(x).tobytes()
        assert guilty.position == 3
        y, position = (await writer.submit(guilty, x[3:], True))[:2]
        assert y.tobytes() == truth(x)[3:].tobytes()
        assert position == 10

    asyncio.run(scenario())
    assert engine.queued == 0
    assert engine.counts.rerun == (poison != INFINITE)


def test_what_fails_in_the_second_of_its_ticks_has_moved_nothing_in_the_first(make: Make) -> None:
    engine, store, writer = make(step_seconds=1e-5)
    x = drawn(30, 1)
    bad = x.copy()
    bad[29, 1] = INFINITE

    async def scenario() -> None:
        guilty, *others = (store.create_now(engine, None)[0] for _ in range(4))
        await writer.submit(guilty, x[:3], True)
        results = await asyncio.gather(
            *(writer.submit(other, x[:10], True) for other in others),
            writer.submit(guilty, bad, True),
            return_exceptions=True,
        )
        assert isinstance(results[-1], NotFinite)
        assert engine.arena.read(guilty.slot)["s"].tobytes() == truth(x[:3])[-1].tobytes()
        assert engine.arena.in_use == 4

    asyncio.run(scenario())
    assert halving(engine).runs == [(1, 3), (4, 10), (1, 20)]


@pytest.mark.parametrize("part", ["gather", "scatter"])
@pytest.mark.parametrize("costly", [False, True])
def test_a_tick_that_cannot_be_made_fails_its_requests_and_the_engine_continues(
    make: Make, part: str, costly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, store, writer = make(step_seconds=1e-2 if costly else 1e-6, quantum=4)
    x, whole, left = drawn(10, 1), getattr(engine.arena, part), [1]

    def short_of_memory(*arguments: Any) -> Any:
        if left:
            left.pop()
            raise MemoryError
        return whole(*arguments)

    async def scenario() -> None:
        sessions = [store.create_now(engine, None)[0] for _ in range(3)]
        await asyncio.gather(*(writer.submit(session, x[:2], True) for session in sessions))
        monkeypatch.setattr(engine.arena, part, short_of_memory)
        failed = await asyncio.gather(
            *(writer.submit(session, x[2:4], True) for session in sessions), return_exceptions=True
        )
        assert any(isinstance(result, ModelFailed) for result in failed)
        for session, result in zip(sessions, failed, strict=True):
            position = 2 if isinstance(result, Exception) else 4
            assert session.position == position
            y, _ = (await writer.submit(session, x[position:], True))[:2]
            assert y.tobytes() == truth(x)[position:].tobytes()

    asyncio.run(scenario())
    assert engine.queued == 0


def test_poison_in_a_block_fails_its_row_alone(make: Make) -> None:
    engine, store, writer = make(max_batch=8)
    x = np.stack([drawn(3, row) for row in range(20)])
    x[5, 1, 0], x[13, 2, 0] = BROKEN, INFINITE

    async def scenario() -> tuple[Any, ...]:
        sessions = [store.create_now(engine, None)[0] for _ in range(20)]
        await store.delete("", sessions[2].id)
        slots = np.array([session.slot for session in sessions])
        return await writer.submit_many(sessions, slots, x)

    y, positions, problems, _ = asyncio.run(scenario())
    assert {row: type(problem) for row, problem in problems.items()} == {
        2: SessionGone,
        5: ModelFailed,
        13: NotFinite,
    }
    for row in set(range(20)) - set(problems):
        assert y[row].tobytes() == truth(x[row]).tobytes()
        assert positions[row] == 3
    assert (positions[5], positions[13]) == (0, 0)


def test_sequences_of_one_length_are_few_items_and_each_is_answered_for_itself(make: Make) -> None:
    engine, _, _ = make(max_batch=64, max_queued_steps=10_000)
    sequences = [drawn(1 + number % 3, number) for number in range(1000)]
    items: list[Any] = []
    submit = engine.submit

    def counted(*given: Any, **named: Any) -> Any:
        items.append(given)
        return submit(*given, **named)

    engine.submit = counted  # type: ignore[method-assign]
    outputs, states = asyncio.run(engine.sequences.run(sequences, None, True, True, "sequences"))
    assert len(items) < 100
    for y, x in zip(outputs, sequences, strict=True):
        assert y.tobytes() == truth(x).tobytes()
    assert len(states) == 1000
    sequences[400][0, 0] = INFINITE
    with pytest.raises(NotFinite, match=r"^sequences\[400\]: "):
        asyncio.run(engine.sequences.run(sequences, None, True, False, "sequences"))
    assert engine.is_idle


def test_a_session_that_ended_after_it_was_looked_up_never_moves_its_slots_next_owner(make: Make) -> None:
    engine, store, writer = make()

    async def scenario() -> None:
        ended = store.create_now(engine, None)[0]
        await store.delete("", ended.id)
        while (heir := store.create_now(engine, None)[0]).slot != ended.slot:
            pass
        with pytest.raises(SessionGone):
            await writer.submit(ended, drawn(1, 0), True)
        y, position = (await writer.submit(heir, drawn(3, 1), True))[:2]
        assert (y.tobytes(), position) == (truth(drawn(3, 1)).tobytes(), 3)

    asyncio.run(scenario())


def test_a_cancelled_step_is_dropped_before_it_is_computed_and_moves_nothing(make: Make) -> None:
    engine, store, writer = make(step_seconds=1e-2)
    runtime: Any = engine.model.runtime

    async def scenario() -> None:
        busy, gone, after = (store.create_now(engine, None)[0] for _ in range(3))
        runtime.gate.clear()
        first = asyncio.ensure_future(writer.submit(busy, drawn(30, 1), True))
        await turns()
        leaving = asyncio.ensure_future(writer.submit(gone, drawn(17, 2), True))
        behind = asyncio.ensure_future(writer.submit(gone, drawn(5, 3), True))
        staying = asyncio.ensure_future(writer.submit(after, drawn(17, 4), True))
        await turns()
        leaving.cancel()
        await asyncio.sleep(0)
        runtime.gate.set()
        y, position, _ = await behind
        assert (y.tobytes(), position) == (truth(drawn(5, 3)).tobytes(), 5)
        assert (await staying)[0].tobytes() == truth(drawn(17, 4)).tobytes()
        await first
        with pytest.raises(asyncio.CancelledError):
            await leaving

    asyncio.run(scenario())
    assert sorted(runtime.runs) == [(1, 5), (1, 17), (1, 30)]  # behind, staying, busy; not the 17 steps of leaving
    assert engine.queued == 0


def test_the_queue_is_bounded_and_what_was_accepted_is_answered(make: Make) -> None:
    engine, store, writer = make(max_queued_steps=100, step_seconds=1e-2)

    async def scenario() -> list[Any]:
        halving(engine).gate.clear()
        sessions = [store.create_now(engine, None)[0] for _ in range(10)]
        waiting = [asyncio.ensure_future(writer.submit(session, drawn(30, 0), True)) for session in sessions]
        await turns()
        halving(engine).gate.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        # Who was refused can go on.
        await asyncio.gather(*(writer.submit(session, drawn(1, 0), True) for session in sessions))
        return results

    results = asyncio.run(scenario())
    refused = [result for result in results if isinstance(result, QueueFull)]
    answered = [result for result in results if not isinstance(result, Exception)]
    assert len(answered) == 3
    assert len(refused) == 7
    assert all(y.tobytes() == truth(drawn(30, 0)).tobytes() for y, _, _ in answered)


def test_a_long_sequence_on_the_thread_does_not_hold_up_single_steps(make: Make) -> None:
    engine, store, writer = make(step_seconds=1e-4)
    runtime: Any = engine.model.runtime

    async def scenario() -> None:
        long, short = store.create_now(engine, None)[0], store.create_now(engine, None)[0]
        await writer.submit(short, drawn(1, 0), True)  # runs in the event loop
        free, runtime.gate = runtime.gate, type(runtime.gate)()
        held = asyncio.ensure_future(writer.submit(long, drawn(500, 0), True))
        await turns()
        assert not held.done()
        stuck, runtime.gate = runtime.gate, free  # the thread is held up, those who come now are not
        position = (await asyncio.wait_for(writer.submit(short, drawn(1, 1), True), 60)).position
        assert position == 2
        assert not held.done()
        stuck.set()
        assert (await held)[0].tobytes() == truth(drawn(500, 0)).tobytes()

    asyncio.run(scenario())


@any_make
@given(st.lists(st.tuples(st.sampled_from(["one", "many", "reset", "delete"]), st.integers(0, 3)), max_size=25))
def test_changes_of_a_session_come_one_by_one_in_order_of_arrival(make: Make, acts: list[tuple[str, int]]) -> None:
    engine, store, writer = make(max_batch=2)
    x = np.ones((1, 2), np.float32)

    async def scenario() -> None:
        sessions = [store.create_now(engine, None)[0] for _ in range(4)]
        expected: list[list[float]] = [[] for _ in sessions]  # the state after each step that is to come
        states = [0.0] * 4
        dead = [False] * 4
        answers: list[tuple[int, Any]] = []

        async def act(kind: str, which: int) -> Any:
            session = sessions[which]
            if kind == "reset":
                await writer.set_state(session, None)
            elif kind == "delete":
                await store.delete("", session.id)
            elif kind == "one":
                return (await writer.submit(session, x, True))[0][0, 0]
            return None

        waiting = []
        for kind, which in acts:
            if kind == "many":
                live = [number for number in range(4) if not dead[number]]
                if not live:
                    continue
                chosen = [sessions[number] for number in live]
                slots = np.array([session.slot for session in chosen])
                waiting.append(
                    asyncio.ensure_future(writer.submit_many(chosen, slots, np.ones((len(live), 1, 2), np.float32)))
                )
                answers.append((-1, live))
                for number in live:
                    states[number] = states[number] / 2 + 1
                    expected[number].append(states[number])
                continue
            if dead[which]:
                continue
            waiting.append(asyncio.ensure_future(act(kind, which)))
            answers.append((which, kind))
            if kind == "one":
                states[which] = states[which] / 2 + 1
                expected[which].append(states[which])
            elif kind == "reset":
                states[which] = 0.0
            else:
                dead[which] = True
            await asyncio.sleep(0)
        results: list[Any] = await asyncio.wait_for(asyncio.gather(*waiting), 60)
        got: list[list[float]] = [[] for _ in sessions]
        for (which, what), result in zip(answers, results, strict=True):
            if which == -1:
                assert not result[2]
                for row, number in enumerate(what):
                    got[number].append(float(result[0][row, 0, 0]))
            elif what == "one":
                got[which].append(float(result))
        assert got == [[float(np.float32(value)) for value in values] for values in expected]

    asyncio.run(scenario())
    assert store.table.locks[engine].contended == 0


def test_a_long_request_whose_client_leaves_ends_with_the_tick_and_moves_nothing(make: Make) -> None:
    engine, store, writer = make(step_seconds=1e-2, quantum=4)
    runtime: Any = engine.model.runtime

    async def scenario() -> None:
        session = store.create_now(engine, None)[0]
        runtime.gate.clear()
        leaving = asyncio.ensure_future(writer.submit(session, drawn(4000, 1), True))
        await turns()
        leaving.cancel()
        await asyncio.sleep(0)
        runtime.gate.set()
        y, position, _ = await writer.submit(session, drawn(3, 2), True)
        assert (y.tobytes(), position) == (truth(drawn(3, 2)).tobytes(), 3)

    asyncio.run(scenario())
    assert runtime.runs == [(1, 4), (1, 3)]
    assert (engine.queued, engine.bound.by_client) == (0, {})


@pytest.mark.parametrize("every_output", [False, True])
def test_a_clients_work_is_counted_until_it_is_done(make: Make, every_output: bool) -> None:
    engine, store, writer = make(max_queued_steps=400, max_queued_steps_per_client=200, quantum=4)

    async def scenario() -> None:
        one, other = (store.create_now(engine, None)[0] for _ in range(2))
        for _ in range(3):
            with pytest.raises(BodyTooLarge):
                await writer.submit(one, drawn(201, 1), every_output)
            results = await asyncio.gather(
                writer.submit(one, drawn(150, 1), every_output), writer.submit(other, drawn(50, 2), every_output)
            )
            assert [len(y) for y, _, _ in results] == ([150, 50] if every_output else [1, 1])
            assert (engine.queued, engine.bound.by_client) == (0, {})

    asyncio.run(scenario())


def test_steps_of_sessions_on_a_device_bring_no_state_to_the_host_or_back() -> None:
    engine, store, writer = machinery(on_device=True, max_batch=8, quantum=4)
    device = halving(engine).on_device
    assert device is not None

    async def client(number: int) -> None:
        session = store.create_now(engine, None)[0]
        x = drawn(30, number)
        ys = [(await writer.submit(session, x[start : start + 6], True))[0] for start in range(0, 30, 6)]
        assert np.concatenate(ys).tobytes() == truth(x).tobytes()

    async def everyone() -> None:
        await asyncio.gather(*(client(number) for number in range(12)))

    asyncio.run(everyone())
    assert (device.read_rows, device.written_rows) == (0, 0)
    (one, *_) = store.table.live.values()
    assert np.isfinite(engine.arena.read(one.slot)["s"]).all()
    assert (device.read_rows, device.written_rows) == (1, 0)
