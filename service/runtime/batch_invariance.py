"""Proves that a row's bits do not depend on what it is computed with: batch, place in it, chunking, padding, threads.

The export runs the whole proof before it writes a model; the service repeats a short one when it loads it, on the
processor and provider that will serve it, since kernels differ between processors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import Exactness, Signature, StateSpec, TensorSpec
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import Layout, parts

Array = NDArray[Any]
MASKED = 0.2  # of the time steps of a draw


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
_ONE_BY_ONE = "the same steps one by one in a batch of another size"
_FEW = 5
SHORT = Effort(batches=(1, 2, 3, 5, 8, 16, 33, 64), time=5, compositions=3, long=0)


class Differs(Exception):
    """Two runs gave a row different bits.

    Args:
        what: Which.
        difference: The largest, relative to numbers beyond 1.
    """

    def __init__(self, what: str, difference: float) -> None:
        super().__init__(what)
        self.difference = difference


def prove(runtimes: Sequence[Runtime], effort: Effort, seed: int = 0) -> Exactness:
    """Says whether runs that differ in everything but the numbers of a row give the row the same bits.

    Args:
        runtimes: One model opened at the settings to prove, several where bits must agree between settings.
        effort: How much to try.
        seed: Of the random states, inputs, lengths and cuts.
    """
    try:
        return Exactness(proved=True, why=compare(runtimes, effort, seed))
    except Differs as differs:
        return Exactness(proved=False, why=str(differs))


def compare(runtimes: Sequence[Runtime], effort: Effort, seed: int = 0) -> str:
    """Compares bits as `prove` does; says over what they were the same.

    Raises:
        Differs: They are not.
    """
    if runtimes[0].signature.batch == 1:  # each row has a run of its own in any batch
        effort = replace(effort, batches=effort.batches[:_FEW])
    count = sum(1 for _ in _comparisons(runtimes, effort, np.random.default_rng(seed)))
    threads = "/".join(str(runtime.options.threads) for runtime in runtimes)
    varied = "places" if runtimes[0].signature.predict_only else "places, chunkings, paddings"
    return (
        f"the same bits in {count} comparisons over batch sizes {effort.batches[0]} to {effort.batches[-1]}, "
        f"{varied}; threads {threads}; {runtimes[0].provider}"
    )


def _comparisons(runtimes: Sequence[Runtime], effort: Effort, rng: np.random.Generator) -> Iterator[None]:
    signature = runtimes[0].signature
    rows = max(effort.batches)
    if signature.predict_only:
        yield from _whole_sequences(runtimes, rows, effort, rng)
        return
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

    x: Array  # [rows, time, *features], as `Runtime.run` takes it
    initial: list[Array]
    y: Array  # [rows, time, *outputs]
    states: list[list[Array]]  # by time step, then state, each as the run gave it

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
    """Draws inputs and states as `Runtime.run` takes them.

    Numbers of inputs are from a normal, of states from a uniform distribution on [-1, 1]; integers are uniform within
    their bounds, those of states from 0 to 2. Some time steps are masked where the model has a mask.
    """
    tensors = [_input(spec, (rows, time), rng) for spec in signature.inputs]
    masked = rng.random((rows, time)) < MASKED
    for spec, tensor in zip(signature.inputs, tensors, strict=True):
        if spec.masked is not None:
            tensor[masked] = spec.masked
    x = Layout(signature.inputs).join(tensors)
    return x, [_state(spec, rows, rng) for spec in signature.states]


def _input(spec: TensorSpec, leading: tuple[int, int], rng: np.random.Generator) -> Array:
    shape = (*leading, *spec.shape)
    if spec.dtype == "float32":
        return rng.normal(size=shape).astype(np.float32)
    low, high = spec.bounds or (0, 1)
    return rng.integers(low, high, shape, spec.dtype, endpoint=True)


def _state(spec: StateSpec, rows: int, rng: np.random.Generator) -> Array:
    shape = (*spec.shape[: spec.batch_axis], rows, *spec.shape[spec.batch_axis :])
    if spec.dtype == "float32":
        return rng.uniform(-1, 1, shape).astype(np.float32)
    return rng.integers(0, 2, shape, spec.dtype, endpoint=True)


def _whole_sequences(
    runtimes: Sequence[Runtime], rows: int, effort: Effort, rng: np.random.Generator
) -> Iterator[None]:
    """Compares the rows of batches of whole sequences from zeros, of one length each, with each row alone."""
    fewest = runtimes[0].signature.min_steps
    for time in (max(effort.time, fewest), max(effort.compositions, fewest)):
        x, _ = draw(runtimes[0].signature, rows, time, rng)
        try:
            alone = [_from_zeros(runtimes[0], x[row : row + 1]) for row in range(rows)]
        except Exception as error:  # a convolution, say, that is longer
            reason = str(error).strip().splitlines()[0]
            raise Differs(f"sequences of {time} time steps cannot be run ({reason})", math.inf) from None
        for runtime, batch in itertools.product(runtimes, effort.batches):
            chosen = rng.permutation(rows)[:batch]
            y = _from_zeros(runtime, x[chosen])
            for place, row in enumerate(chosen):
                _same(y[place], alone[row][0], f"row {place} of a batch of {batch} sequences", "the sequence alone")
                yield


def _from_zeros(runtime: Runtime, x: Array) -> Array:
    lengths = np.full(len(x), x.shape[1], np.int32)
    return runtime.run(np.ascontiguousarray(x), lengths, runtime.zeros(len(x)))[0]


def _batches(
    runtimes: Sequence[Runtime], truth: Truth, batches: Sequence[int], rng: np.random.Generator
) -> Iterator[None]:
    time = truth.x.shape[1]
    signature = runtimes[0].signature
    for runtime, batch in itertools.product(runtimes, batches):
        rows = rng.permutation(len(truth.x))[:batch]
        lengths = rng.integers(1, time + 1, batch).astype(np.int32)
        padding = rng.integers(0, 4)
        x, _ = draw(signature, batch, time + padding, rng)
        for place, row in enumerate(rows):
            x[place, : lengths[place]] = truth.x[row, : lengths[place]]
        initial = [
            np.take(state, rows, spec.batch_axis) for state, spec in zip(truth.initial, signature.states, strict=True)
        ]
        y, states = runtime.run(x, lengths, initial)
        for place, row in enumerate(rows):
            length = lengths[place]
            what = f"row {place} of a batch of {batch}, {length} of {time + padding} time steps"
            _same(y[place, :length], truth.y[row, :length], f"the output of {what}")
            for spec, state, true in zip(signature.states, states, truth.states[length - 1], strict=True):
                own, wanted = np.take(state, place, spec.batch_axis), np.take(true, row, spec.batch_axis)
                _same(own, wanted, f"{spec.name} of {what}")
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


def _same(one: Array, other: Array, what: str, than: str = _ONE_BY_ONE) -> None:
    if one.tobytes() == other.tobytes():
        return
    difference = 0.0
    if one.shape != other.shape:
        raise Differs(f"{what} has another shape, {list(one.shape)}, than {than}, {list(other.shape)}", math.inf)
    for own, true in zip(parts(one), parts(other), strict=True):
        off = np.abs(own.astype(np.float64) - true.astype(np.float64))
        difference = max(difference, float(np.max(off / np.maximum(1, np.abs(true)), initial=0)))
    raise Differs(f"{what} differs from {than}, by {difference:.1e}", difference)
