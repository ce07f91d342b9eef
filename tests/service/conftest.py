"""A model whose steps are plain arithmetic, so that the engine can be watched and made to fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cellserve.models.signature import Exactness, Signature, StateSpec, TensorSpec
from cellserve.service.engine.engine import Engine
from cellserve.service.runtime.tensor_layout import Layout
from cellserve.service.sessions.stores.memory import MemoryStore
from cellserve.service.sessions.table import SessionTable
from cellserve.service.sessions.writer import SessionWriter
from cellserve.service.settings import Settings

BROKEN, INFINITE = 666.0, 777.0  # inputs at which the model raises, or gives infinity


class Halving:
    """`s' = s / 2 + x`, `y = s'`; notes the shape of every run, and can be held up."""

    def __init__(self) -> None:
        self.signature = Signature(
            inputs=(TensorSpec(name="x", shape=(2,)),),
            outputs=(TensorSpec(name="y", shape=(2,)),),
            states=(StateSpec(name="s", next_name="s.next", shape=(2,)),),
        )
        self.runs: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.step_seconds = 1e-6

    def seconds(self, batch: int, time_steps: int) -> float:
        return 1e-6 + batch * time_steps * self.step_seconds

    def run(
        self, x: NDArray[Any], lengths: NDArray[np.int32], states: list[NDArray[Any]]
    ) -> tuple[NDArray[Any], list[NDArray[Any]]]:
        self.gate.wait()
        self.runs.append(x.shape[:2])
        if (x == BROKEN).any():
            raise RuntimeError("broken input")
        y, state, final = np.zeros_like(x), states[0], states[0].copy()
        for t in range(x.shape[1]):
            state = np.where(x[:, t] == INFINITE, np.inf, state / 2 + x[:, t]).astype(np.float32)
            y[:, t] = state
            final[lengths == t + 1] = state[lengths == t + 1]
        return y, [final]


class Model:
    """What the engine asks of a model."""

    def __init__(self, exact: bool = True) -> None:
        self.name, self.version, self.digest = "halving", 1, "0" * 64
        self.runtime = Halving()
        self.exactness = Exactness(proved=exact, why="")
        self.inputs, self.outputs = Layout(self.runtime.signature.inputs), Layout(self.runtime.signature.outputs)


def truth(x: NDArray[Any], state: NDArray[Any] | None = None) -> NDArray[Any]:
    """One run over the whole sequence `[time, 2]`."""
    state = np.zeros(2, np.float32) if state is None else state
    ys = []
    for row in x:
        state = (state / 2 + row).astype(np.float32)
        ys.append(state)
    return np.array(ys)


def machinery(
    exact: bool = True,
    step_seconds: float = 1e-6,
    clock: Callable[[], float] = time.monotonic,
    max_sessions: int | None = None,
    **more: Any,
) -> tuple[Engine, MemoryStore, SessionWriter]:
    """Makes an engine over the model, the store of its sessions, and what writer them."""
    model: Any = Model(exact)
    model.runtime.step_seconds = step_seconds
    engine = Engine(model, Settings(**more), ThreadPoolExecutor(1))
    table = SessionTable(100, clock)
    table.register(engine)
    store = MemoryStore(table, max_sessions or engine.arena.limit, 86400)
    return engine, store, SessionWriter(store)


@pytest.fixture
def make() -> Callable[..., tuple[Engine, MemoryStore, SessionWriter]]:
    """Gives what makes all of it."""
    return machinery
