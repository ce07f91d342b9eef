"""Requests of thousands of sequences leave the event loop to others, and the garbage collector little to visit."""

from __future__ import annotations

import asyncio
import gc

import numpy as np

from cellserve.service.validation.json_input import split
from tests.service.helpers import machinery

MANY = 4096


def test_a_request_of_thousands_of_sequences_is_enqueued_and_answered_in_turns_with_others() -> None:
    engine, _, _ = machinery(max_batch=64, quantum=16)
    x = np.random.default_rng(1).normal(size=(MANY, 2)).astype(np.float32)
    submitted: list[int] = []  # by turn of the event loop: the items that were enqueued
    read: list[int] = []  # the states that were read
    submit, read_states = engine.submit, engine.arena.read

    def counted_submit(*given: object, **named: object) -> object:
        submitted[-1] += 1
        return submit(*given, **named)  # type: ignore[arg-type]

    def counted_read(slot: int) -> object:
        read[-1] += 1
        return read_states(slot)

    engine.submit, engine.arena.read = counted_submit, counted_read  # type: ignore[assignment, method-assign]

    async def others(ended: asyncio.Event) -> None:
        while not ended.is_set():
            submitted.append(0)
            read.append(0)
            await asyncio.sleep(0)

    async def all_of_it() -> tuple[list[np.ndarray], list[dict[str, np.ndarray]]]:
        ended = asyncio.Event()
        beside = asyncio.create_task(others(ended))
        await asyncio.sleep(0)
        answer = await engine.sequences.run(split(x, [1] * MANY), None, False, True, "sequences")
        ended.set()
        await beside
        return answer

    outputs, states = asyncio.run(all_of_it())
    assert len(outputs) == len(states) == sum(read) == MANY
    assert max(submitted) <= 64
    assert max(read) <= 16


def test_sequences_of_a_request_are_a_single_object_to_the_collector() -> None:
    x = np.arange(2 * MANY, dtype=np.float32)[:, None]
    sequences = split(x, [2] * MANY)
    assert len(sequences) == MANY
    assert len(gc.get_referents(*gc.get_referents(sequences), sequences)) < 100
    assert np.concatenate(list(sequences)).tobytes() == x.tobytes()
    assert sequences[MANY - 1].tolist() == list(sequences)[-1].tolist() == x[-2:].tolist()
