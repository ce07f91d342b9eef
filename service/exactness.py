"""Proves that a row's bits do not depend on what it is computed with: batch, place in it, chunking, padding, threads.

The export runs the whole proof before it writes a model; the service repeats a short one when it loads it, on the
processor and provider that will serve it, since kernels differ between processors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.signature import Exactness, Signature
from service.runtime import Runtime

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much a proof tries."""

    batches: Sequence[int]  # batch sizes, each with rows, places and lengths drawn anew
    time: int  # steps of those runs
    compositions: int  # a sequence of this many steps is cut in every way there is: 2 ** (compositions - 1)
    long: int  # steps of one more run that is cut at random

    def up_to(self, batch: int) -> Effort:
        """Gives the effort that tries a largest batch."""
        return replace(self, batches=(*(size for size in self.batches if size < batch), batch))


WHOLE = Effort(batches=(*range(1, 65), 128, 256), time=12, compositions=7, long=200)
SHORT = Effort(batches=(1, 2, 3, 5, 8, 16, 33, 64), time=5, compositions=3, long=0)


def prove(runtimes: Sequence[Runtime], effort: Effort, seed: int = 0) -> Exactness:
    """Compares bits between runs that differ in everything but the numbers of a row.

    Args:
        runtimes: One model opened at the settings to prove, several where bits must agree between settings.
        effort: How much to try.
        seed: Of the random states, inputs, lengths and cuts.
    """
    try:
        count = sum(1 for _ in _comparisons(runtimes, effort, np.random.default_rng(seed)))
    except _Differs as differs:
        return Exactness(proved=False, why=str(differs))
    threads = "/".join(str(runtime.options.threads) for runtime in runtimes)
    return Exactness(
        proved=True,
        why=f"the same bits in {count} comparisons over batch sizes {effort.batches[0]} to {effort.batches[-1]}, "
        f"places, chunkings, paddings; threads {threads}; {runtimes[0].provider}",
    )


class _Differs(Exception):
    """Two runs gave a row different bits."""


def _comparisons(runtimes: Sequence[Runtime], effort: Effort, rng: np.random.Generator) -> Iterator[None]:
    signature = runtimes[0].signature
    rows = max(effort.batches)
    yield from _batches(runtimes, Truth.of(runtimes[0], rows, effort.time, rng), effort.batches, rng)
    cuts = [
        tuple(place + 1 for place, cut in enumerate(choice) if cut)
        for choice in itertools.product((False, True), repeat=effort.compositions - 1)
    ]
    for runtime in runtimes:
        yield from _chunkings(runtime, Truth.of(runtime, 3, effort.compositions, rng), cuts, signature)
        if effort.long:
            places = np.arange(1, effort.long)
            random_cuts = [tuple(np.sort(rng.choice(places, count, replace=False))) for count in (0, 1, 5, 30)]
            yield from _chunkings(runtime, Truth.of(runtime, 4, effort.long, rng), random_cuts, signature)


@dataclass(frozen=True, slots=True)
class Truth:
    """What the other runs must repeat: rows stepped one time step at a time."""

    x: Array  # [rows, time, *features]
    initial: list[Array]
    y: Array  # [rows, time, *outputs]
    states: list[list[Array]]  # by time step, then state

    @classmethod
    def of(cls, runtime: Runtime, rows: int, time: int, rng: np.random.Generator) -> Truth:
        """Draws random inputs and states and steps them."""
        x, initial = draw(runtime.signature, rows, time, rng)
        states, ys, history = initial, [], []
        for t in range(time):
            y, states = runtime.run(np.ascontiguousarray(x[:, t : t + 1]), np.ones(rows, np.int32), states)
            ys.append(y)
            history.append(states)
        return cls(x, initial, np.concatenate(ys, axis=1), history)


def draw(signature: Signature, rows: int, time: int, rng: np.random.Generator) -> tuple[Array, list[Array]]:
    """Draws inputs `[rows, time, *features]` from a normal and states from a uniform distribution on [-1, 1]."""
    spec = signature.inputs[0]
    x = rng.normal(size=(rows, time, *spec.shape)).astype(spec.dtype)
    return x, [rng.uniform(-1, 1, (rows, *state.shape)).astype(state.dtype) for state in signature.states]


def _batches(
    runtimes: Sequence[Runtime], truth: Truth, batches: Sequence[int], rng: np.random.Generator
) -> Iterator[None]:
    time = truth.x.shape[1]
    for runtime, batch in itertools.product(runtimes, batches):
        rows = rng.permutation(len(truth.x))[:batch]
        lengths = rng.integers(1, time + 1, batch).astype(np.int32)
        padding = rng.integers(0, 4)
        x = rng.normal(size=(batch, time + padding, *truth.x.shape[2:])).astype(truth.x.dtype)
        for place, row in enumerate(rows):
            x[place, : lengths[place]] = truth.x[row, : lengths[place]]
        y, states = runtime.run(x, lengths, [state[rows] for state in truth.initial])
        for place, row in enumerate(rows):
            length = lengths[place]
            what = f"row {place} of a batch of {batch}, {length} of {time + padding} time steps"
            _same(y[place, :length], truth.y[row, :length], f"the output of {what}")
            for spec, state, true in zip(runtime.signature.states, states, truth.states[length - 1], strict=True):
                _same(state[place], true[row], f"{spec.name} of {what}")
            yield


def _chunkings(runtime: Runtime, truth: Truth, cuts: list[tuple[int, ...]], signature: Signature) -> Iterator[None]:
    rows, time = truth.x.shape[:2]
    for places in cuts:
        states = truth.initial
        for start, stop in itertools.pairwise((0, *places, time)):
            lengths = np.full(rows, stop - start, np.int32)
            y, states = runtime.run(np.ascontiguousarray(truth.x[:, start:stop]), lengths, states)
            what = f"steps {start} to {stop} in one run"
            _same(y, truth.y[:, start:stop], f"the output of {what}")
            for spec, state, true in zip(signature.states, states, truth.states[stop - 1], strict=True):
                _same(state, true, f"{spec.name} after {what}")
        yield


def _same(one: Array, other: Array, what: str) -> None:
    if one.tobytes() != other.tobytes():
        difference = np.abs(one.astype(np.float64) - other.astype(np.float64)).max()
        raise _Differs(f"{what} differs from the same steps one by one in a batch of another size, by {difference:.1e}")
