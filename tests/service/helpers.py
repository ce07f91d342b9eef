"""What the service's tests share: a model whose steps are plain arithmetic, and what serves it without a server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import Exactness, Signature, StateSpec, TensorSpec
from cellserve.service.engine.engine import Engine
from cellserve.service.model_manager import ModelManager, VersionState
from cellserve.service.model_repository.repository import Repository
from cellserve.service.model_repository.trial import Trial
from cellserve.service.runtime.onnx_model import RuntimeOptions
from cellserve.service.runtime.providers import is_of_cuda
from cellserve.service.runtime.shape_policy import ANY_SHAPE
from cellserve.service.runtime.tensor_layout import TensorLayout
from cellserve.service.sessions.stores.memory import MemoryStore
from cellserve.service.sessions.table import SessionTable
from cellserve.service.sessions.writer import SessionWriter
from cellserve.service.settings import Settings

BROKEN, INFINITE = 666.0, 777.0  # inputs at which the model raises, or gives infinity
LOST = 999.0  # at which it raises as ONNX Runtime does when the driver is gone
OUTSIDE = 888.0  # at which it raises as ONNX Runtime does for an index outside a table


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
        self.on_device: OnDevice | None = None
        self.lost_device = False
        self.clock = time.perf_counter
        self.shapes = ANY_SHAPE

    def has_lost_device(self, error: Exception) -> bool:
        self.lost_device |= is_of_cuda(error)
        return self.lost_device

    def seconds(self, batch: int, time_steps: int) -> float:
        return 1e-6 + batch * time_steps * self.step_seconds

    def run(
        self, x: NDArray[Any], lengths: NDArray[np.int32], states: list[NDArray[Any]]
    ) -> tuple[NDArray[Any], list[NDArray[Any]]]:
        self.gate.wait()
        self.runs.append(x.shape[:2])
        if (x == LOST).any():
            raise RuntimeError(
                "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 719: unspecified launch failure ; GPU=0 ; ..."
            )
        if (x == OUTSIDE).any():
            raise RuntimeError("indices element out of data bounds, idx=24 must be within the inclusive range [-24,23]")
        if (x == BROKEN).any():
            raise RuntimeError("broken input")
        y, state, final = np.zeros_like(x), states[0], states[0].copy()
        for t in range(x.shape[1]):
            state = np.where(x[:, t] == INFINITE, np.inf, state / 2 + x[:, t]).astype(np.float32)
            y[:, t] = state
            final[lengths == t + 1] = state[lengths == t + 1]
        return y, [final]


class OnDevice:
    """Runs the halving model on states in memory of its own, which only what a device offers can read or write."""

    def __init__(self, runtime: Halving) -> None:
        self._runtime = runtime
        self.capacity = 2
        self._memory = np.zeros((2, 2), np.float32)
        self.read_rows = self.written_rows = 0  # so many crossed between the host and the device

    def tables(self) -> OnDevice:
        return self

    def run(
        self, x: NDArray[Any], lengths: NDArray[np.int32], sources: NDArray[Any], targets: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        assert targets.min() > 0 and not np.intersect1d(sources, targets).size
        y, (following,) = self._runtime.run(x, lengths, [self._memory[sources]])
        self._memory[targets] = following
        return y, np.isfinite(following).all(axis=1)

    def read(self, rows: NDArray[Any]) -> list[NDArray[Any]]:
        self.read_rows += len(rows)
        return [self._memory[rows]]

    def write(self, rows: NDArray[Any], states: list[NDArray[Any]]) -> None:
        assert rows.min() > 1
        self.written_rows += len(rows)
        self._memory[rows] = states[0]

    def resize(self, sources: NDArray[Any]) -> None:
        self._memory = self._memory[sources]
        self.capacity = len(sources)

    def close(self) -> None:
        self._memory, self.capacity = self._memory[:0], 0


class Model:
    """What the engine asks of a model."""

    def __init__(self, exact: bool = True) -> None:
        self.name, self.version, self.digest = "halving", 1, "0" * 64
        self.runtime = Halving()
        self.exactness = Exactness(proved=exact, why="")
        self.runs_batches, self.bits_may_differ = exact, False
        signature = self.runtime.signature
        self.inputs, self.outputs = TensorLayout(signature.inputs), TensorLayout(signature.outputs)


def halving(engine: Engine) -> Halving:
    """Returns the model's runtime, to look at its runs and to hold them up."""
    runtime: Any = engine.model.runtime
    assert isinstance(runtime, Halving)
    return runtime


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
    on_device: bool = False,
    **more: Any,
) -> tuple[Engine, MemoryStore, SessionWriter]:
    """Makes an engine over the model, the store of its sessions, and what writer them."""
    model: Any = Model(exact)
    model.runtime.step_seconds = step_seconds
    if on_device:
        model.runtime.on_device = OnDevice(model.runtime)
    engine = Engine(model, Settings(**more), ThreadPoolExecutor(1))
    table = SessionTable(100, clock)
    table.register(engine)
    store = MemoryStore(table, max_sessions or engine.arena.limit, 86400)
    return engine, store, SessionWriter(store)


class NoTrial(Trial):
    """Lets every version through."""

    def open(self, *_: object) -> None:
        """Opens nothing."""

    def open_at_start(self, *_: object) -> None:
        """Opens nothing."""


class Served:
    """A repository whose versions are served, without a server.

    Args:
        models: The repository.
        max_old: Versions loaded on request, at most.
        max_bytes: Size of a model file, at most.
        tried_first: Whether new versions are opened in a process of their own first, which takes a second.
    """

    def __init__(self, models: Path, max_old: int = 8, max_bytes: int = 10**9, tried_first: bool = False) -> None:
        self.now = 0.0
        self.thread = ThreadPoolExecutor(1)
        settings = Settings(max_batch=4, quantum=8, max_sessions=100)
        self.store = MemoryStore(SessionTable(1e9, lambda: self.now), 100, 1e9)
        self.writer = SessionWriter(self.store)
        ticks = ThreadPoolExecutor(1)
        repository = Repository(models, RuntimeOptions("cpu"), 4, max_bytes)
        if not tried_first:
            repository.trial = NoTrial()
        self.versions = ModelManager(
            repository,
            lambda model: Engine(model, settings, ticks),
            self.store.table,
            max_old,
            self.thread,
            lambda: self.now,
        )

    def reload(self, again: bool = False) -> None:
        asyncio.run(self.versions.reload(again))

    def sweep(self) -> None:
        """An engine is freed, on the thread, after the turn in which it was dismissed."""
        self.versions.sweep()
        self.versions.sweep()
        self.thread.submit(int).result()

    def serving(self) -> dict[str, int]:
        return {name: engine.model.version for name, engine in self.versions.newest.items()}

    def states(self, name: str = "rnn") -> dict[int, str]:
        return {state.key.version: state.state for state in self.versions.states()[name]}

    def state(self, version: int) -> VersionState:
        return next(state for state in self.versions.states()["rnn"] if state.key.version == version)
