"""Checks batch invariance: a row's bits must not depend on batch size, place, chunking, padding or threads.

The export runs the full check before it writes a model. The service runs a quick one when it loads the model, on the
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
from cellserve.service.runtime.shape_policy import ANY_SHAPE, ONE_BY_ONE, POLICIES, ShapePolicy
from cellserve.service.runtime.tensor_layout import TensorLayout, unpack

Array = NDArray[Any]
MASKED = 0.2  # fraction of random time steps that are masked


@dataclass(frozen=True, slots=True)
class CheckPlan:
    """How much a check tries."""

    batches: Sequence[int]  # batch sizes, each with new random rows, places and lengths
    time: int  # time steps of those runs
    compositions: int  # time steps of a sequence that is cut in all 2 ** (compositions - 1) ways
    long: int  # time steps of a sequence that is cut at random; 0 for none

    def up_to(self, batch: int) -> CheckPlan:
        """Returns the plan with `batch` as the largest batch size."""
        return replace(self, batches=(*(size for size in self.batches if size < batch), batch))


FULL_PLAN = CheckPlan(batches=(*range(1, 65), 128, 256), time=12, compositions=7, long=256)
_STEP_BY_STEP = "the same steps one by one in a batch of another size"
_FEW = 5
QUICK_PLAN = CheckPlan(batches=(1, 2, 3, 5, 8, 16, 33, 64), time=5, compositions=3, long=0)


class NotBatchInvariant(Exception):
    """Two runs gave a row different bits.

    Args:
        what: Which runs, and where they differ.
        difference: The largest difference: relative for numbers beyond 1, absolute below.
    """

    def __init__(self, what: str, difference: float) -> None:
        super().__init__(what)
        self.difference = difference


def check_batch_invariance(runtimes: Sequence[Runtime], plan: CheckPlan, seed: int = 0) -> Exactness:
    """Checks whether a row gets the same bits in runs that differ in everything else.

    Args:
        runtimes: One model, opened with the settings to check; several runtimes if bits must agree between settings.
        plan: How much to try.
        seed: Seed of the random states, inputs, lengths and cuts.
    """
    try:
        return Exactness(proved=True, why=compare_runs(runtimes, plan, seed))
    except NotBatchInvariant as differs:
        return Exactness(proved=False, why=str(differs))


def find_shapes(
    runtimes: Sequence[Runtime], plan: CheckPlan, policies: Sequence[ShapePolicy] = POLICIES, seed: int = 0
) -> Exactness:
    """Finds the shapes of runs for which a model is batch invariant, and lets the runtimes use them from now on.

    Args:
        runtimes: As for `check_batch_invariance`.
        plan: How much to try.
        policies: The first of them that holds is taken.
        seed: As for `check_batch_invariance`.
    """
    first: Exactness | None = None
    for policy in policies:
        if not _fits(policy, runtimes[0].signature):
            continue
        for runtime in runtimes:
            runtime.shapes = policy
        found = check_batch_invariance(runtimes, plan, seed)
        if found.proved:
            why = found.why if first is None else f"{found.why}; in {policy.name}, since otherwise {first.why}"
            return Exactness(proved=True, why=why, shapes=policy.name)
        first = first or found
    for runtime in runtimes:
        runtime.shapes = ANY_SHAPE
    return Exactness(proved=False, why=first.why if first else "no shapes are left to try", shapes=ONE_BY_ONE)


def _fits(policy: ShapePolicy, signature: Signature) -> bool:
    """Whether a policy can be tried: rows of a fixed batch are not padded, nor the steps of whole sequences."""
    if policy is ANY_SHAPE:
        return True
    return signature.batch is None and not (policy.step_sizes and signature.predict_only)


def compare_runs(runtimes: Sequence[Runtime], plan: CheckPlan, seed: int = 0) -> str:
    """Compares bits as `check_batch_invariance` does; returns a summary of what was compared.

    Raises:
        NotBatchInvariant: The bits differ.
    """
    if runtimes[0].signature.batch == 1:  # each row has its own run, whatever the batch
        plan = replace(plan, batches=plan.batches[:_FEW])
    count = sum(1 for _ in _comparisons(runtimes, plan, np.random.default_rng(seed)))
    threads = "/".join(str(runtime.options.threads) for runtime in runtimes)
    varied = "places" if runtimes[0].signature.predict_only else "places, chunkings, paddings"
    return (
        f"the same bits in {count} comparisons over batch sizes {plan.batches[0]} to {plan.batches[-1]}, "
        f"{varied}; threads {threads}; {runtimes[0].provider}"
    )


def _comparisons(runtimes: Sequence[Runtime], plan: CheckPlan, rng: np.random.Generator) -> Iterator[None]:
    signature = runtimes[0].signature
    rows = max(plan.batches)
    if signature.predict_only:
        yield from _whole_sequences(runtimes, rows, plan, rng)
        return
    yield from _batches(runtimes, Baseline.of(runtimes[0], rows, plan.time, rng), plan.batches, rng)
    cuts = [
        tuple(place + 1 for place, cut in enumerate(choice) if cut)
        for choice in itertools.product((False, True), repeat=plan.compositions - 1)
    ]
    for runtime in runtimes:
        yield from _chunkings(runtime, Baseline.of(runtime, 3, plan.compositions, rng), cuts, signature)
        if plan.long:
            places = np.arange(1, plan.long)
            random_cuts = [tuple(np.sort(rng.choice(places, count, replace=False))) for count in (0, 1, 5, 30)]
            yield from _chunkings(runtime, Baseline.of(runtime, 4, plan.long, rng), random_cuts, signature)


@dataclass(frozen=True, slots=True)
class Baseline:
    """The reference that all other runs must repeat: rows stepped one time step at a time."""

    x: Array  # [rows, time, *features], as `Runtime.run` takes it
    initial: list[Array]
    y: Array  # [rows, time, *outputs]
    states: list[list[Array]]  # by time step, then state, as `Runtime.run` returns them

    @classmethod
    def of(cls, runtime: Runtime, rows: int, time: int, rng: np.random.Generator) -> Baseline:
        """Steps random inputs from random states."""
        x, initial = random_inputs(runtime.signature, rows, time, rng)
        states, ys, history = initial, [], []
        for t in range(time):
            y, states = runtime.run(np.ascontiguousarray(x[:, t : t + 1]), np.ones(rows, np.int32), states)
            ys.append(y)
            history.append(states)
        return cls(x, initial, np.concatenate(ys, axis=1), history)


def random_inputs(signature: Signature, rows: int, time: int, rng: np.random.Generator) -> tuple[Array, list[Array]]:
    """Returns random inputs and states for `Runtime.run`.

    Float inputs are normally distributed, float states uniformly on [-1, 1]. Integer inputs are uniform within their
    bounds, integer states from 0 to 2. If the model has a mask, some time steps are masked.
    """
    tensors = [_input(spec, (rows, time), rng) for spec in signature.inputs]
    masked = rng.random((rows, time)) < MASKED
    for spec, tensor in zip(signature.inputs, tensors, strict=True):
        if spec.masked is not None:
            tensor[masked] = spec.masked
    x = TensorLayout(signature.inputs).pack(tensors)
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
    runtimes: Sequence[Runtime], rows: int, plan: CheckPlan, rng: np.random.Generator
) -> Iterator[None]:
    """Compares rows of batches of whole sequences, run from zeros, with each row alone."""
    fewest = runtimes[0].signature.min_steps
    for time in (max(plan.time, fewest), max(plan.compositions, fewest)):
        x, _ = random_inputs(runtimes[0].signature, rows, time, rng)
        try:
            alone = [_from_zeros(runtimes[0], x[row : row + 1]) for row in range(rows)]
        except Exception as error:  # for example a convolution that is longer than the sequence
            reason = str(error).strip().splitlines()[0]
            raise NotBatchInvariant(f"sequences of {time} time steps cannot be run ({reason})", math.inf) from None
        for runtime, batch in itertools.product(runtimes, plan.batches):
            chosen = rng.permutation(rows)[:batch]
            y = _from_zeros(runtime, x[chosen])
            for place, row in enumerate(chosen):
                _same(y[place], alone[row][0], f"row {place} of a batch of {batch} sequences", "the sequence alone")
                yield


def _from_zeros(runtime: Runtime, x: Array) -> Array:
    lengths = np.full(len(x), x.shape[1], np.int32)
    return runtime.run(np.ascontiguousarray(x), lengths, runtime.zeros(len(x)))[0]


def _batches(
    runtimes: Sequence[Runtime], baseline: Baseline, batches: Sequence[int], rng: np.random.Generator
) -> Iterator[None]:
    time = baseline.x.shape[1]
    signature = runtimes[0].signature
    for runtime, batch in itertools.product(runtimes, batches):
        rows = rng.permutation(len(baseline.x))[:batch]
        lengths = rng.integers(1, time + 1, batch).astype(np.int32)
        padding = rng.integers(0, 4)
        x, _ = random_inputs(signature, batch, time + padding, rng)
        for place, row in enumerate(rows):
            x[place, : lengths[place]] = baseline.x[row, : lengths[place]]
        initial = [
            np.take(state, rows, spec.batch_axis)
            for state, spec in zip(baseline.initial, signature.states, strict=True)
        ]
        y, states = runtime.run(x, lengths, initial)
        for place, row in enumerate(rows):
            length = lengths[place]
            what = f"row {place} of a batch of {batch}, {length} of {time + padding} time steps"
            _same(y[place, :length], baseline.y[row, :length], f"the output of {what}")
            for spec, state, true in zip(signature.states, states, baseline.states[length - 1], strict=True):
                own, wanted = np.take(state, place, spec.batch_axis), np.take(true, row, spec.batch_axis)
                _same(own, wanted, f"{spec.name} of {what}")
            yield


def _chunkings(
    runtime: Runtime, baseline: Baseline, cuts: list[tuple[int, ...]], signature: Signature
) -> Iterator[None]:
    rows, time = baseline.x.shape[:2]
    for places in cuts:
        states = baseline.initial
        for start, stop in itertools.pairwise((0, *places, time)):
            lengths = np.full(rows, stop - start, np.int32)
            y, states = runtime.run(np.ascontiguousarray(baseline.x[:, start:stop]), lengths, states)
            what = f"steps {start} to {stop} in one run"
            _same(y, baseline.y[:, start:stop], f"the output of {what}")
            for spec, state, true in zip(signature.states, states, baseline.states[stop - 1], strict=True):
                _same(state, true, f"{spec.name} after {what}")
        yield


def _same(one: Array, other: Array, what: str, than: str = _STEP_BY_STEP) -> None:
    if one.tobytes() == other.tobytes():
        return
    difference = 0.0
    if one.shape != other.shape:
        raise NotBatchInvariant(
            f"{what} has another shape, {list(one.shape)}, than {than}, {list(other.shape)}", math.inf
        )
    for own, true in zip(unpack(one), unpack(other), strict=True):
        off = np.abs(own.astype(np.float64) - true.astype(np.float64))
        difference = max(difference, float(np.max(off / np.maximum(1, np.abs(true)), initial=0)))
    raise NotBatchInvariant(f"{what} differs from {than}, by {difference:.1e}", difference)
