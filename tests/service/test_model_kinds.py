"""Sessions of every kind of model, stepped in any chunks among other traffic, give the bits of one run each."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellserve.service.engine.engine import Engine
from cellserve.service.model_repository.model import Model
from cellserve.service.runtime.batch_invariance import random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.sessions.stores.memory import MemoryStore
from cellserve.service.sessions.table import SessionTable
from cellserve.service.sessions.writer import SessionWriter
from cellserve.service.settings import Settings
from tests import foreign
from tests.budgets import examples
from tests.kinds import KINDS

STEPS = 11
ALL_KINDS = {**KINDS, "exact in padded runs": foreign.elementwise("Softplus", 3)}
cuts = st.sets(st.integers(1, STEPS - 1)).map(sorted)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: Model(name, 1, name, Runtime(foreign.described(*kind)), 8) for name, kind in ALL_KINDS.items()}


@pytest.mark.parametrize("kind", ALL_KINDS)
@settings(max_examples=examples(8, 80))
@given(chunks=st.lists(cuts, min_size=1, max_size=6), quantum=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_any_chunks_among_other_traffic_are_one_run(
    models: dict[str, Model], kind: str, chunks: list[list[int]], quantum: int, seed: int
) -> None:
    model = models[kind]
    assert model.exactness.proved, model.exactness.why
    x, _ = random_inputs(model.runtime.signature, len(chunks) + 1, STEPS, np.random.default_rng(seed))
    zeros = model.runtime.zeros(1)
    alone = [model.runtime.run(row[None], np.array([STEPS], np.int32), zeros) for row in x]

    async def traffic() -> None:
        engine = Engine(model, Settings(max_batch=8, quantum=quantum), ThreadPoolExecutor(1))
        store = MemoryStore(SessionTable(100), 100, 100)
        store.table.register(engine)
        writer = SessionWriter(store)

        async def stream(row: int, places: list[int]) -> None:
            session, _ = store.create_now(engine, None)
            parts = []
            for start, stop in zip((0, *places), (*places, STEPS), strict=True):
                parts.append((await writer.submit(session, x[row, start:stop], True)).y)
            assert np.concatenate(parts).tobytes() == alone[row][0][0].tobytes()
            for spec, state in zip(engine.arena.specs, alone[row][1], strict=True):
                kept = engine.arena.read(session.slot)[spec.name]
                assert kept.tobytes() == np.take(state, 0, spec.batch_axis).tobytes()

        async def predict() -> None:
            slots = engine.arena.allocate_many(1)
            assert slots is not None
            y = await engine.submit(slots, x[-1:], True).awaited
            assert y.tobytes() == alone[-1][0].tobytes()

        await asyncio.gather(*(stream(row, places) for row, places in enumerate(chunks)), predict())

    asyncio.run(traffic())
