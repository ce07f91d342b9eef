"""What the proof of batch invariance says on the provider and why, and that the service keeps to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import pytest

from cellserve import Client
from cellserve.service.runtime.batch_invariance import FULL_PLAN, QUICK_PLAN, find_shapes, random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.providers import Provider
from cellserve.service.runtime.shape_policy import ANY_SHAPE
from cellserve.service.settings import Settings
from tests.gpu.conftest import Open
from tests.gpu.references import Array, Reference
from tests.gpu.report import Report
from tests.server import Server

BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256)
CHUNKS = (1, 2, 3, 4, 8, 16, 32)
EFFORTS = {"at every start": QUICK_PLAN.up_to(Settings().max_batch), "whole": FULL_PLAN}


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_proof_finds_the_shapes_of_exact_runs(
    name: str, effort: str, provider: Provider, opened: Open, report: Report
) -> None:
    runtime = opened(name, provider)
    try:
        exactness = find_shapes([runtime], EFFORTS[effort])
    finally:
        runtime.shapes = ANY_SHAPE  # other tests use it too
    report.row(
        "The proof of batch invariance",
        {
            "model": name,
            "proof": effort,
            "exact": exactness.proved,
            "shapes": exactness.shapes,
            "why": exactness.why,
        },
    )


def test_which_shapes_of_a_run_give_the_same_bits_is_reported(
    name: str, provider: Provider, opened: Open, report: Report
) -> None:
    runtime = opened(name, provider)
    rng = np.random.default_rng(3)
    x, states = random_inputs(runtime.signature, max(BATCHES), max(CHUNKS), rng)

    def by_batch(rows: int) -> bytes:
        """The first row's bits after one step, in a batch of so many rows."""
        return first_row(*run(runtime, x[:rows, :1], [state[:rows] for state in states]))

    def by_place(place: int) -> bytes:
        """The same row's bits in another place of a batch of 64."""
        order = np.roll(np.arange(64), place)
        y, final = run(runtime, x[order, :1], [state[order] for state in states])
        return b"".join(array[place].tobytes() for array in (y, *final))

    def by_chunk(steps: int) -> bytes:
        """Four rows' bits after 32 steps, in chunks of so many."""
        last, ys = [state[:4] for state in states], []
        for start in range(0, max(CHUNKS), steps):
            y, last = run(runtime, x[:4, start : start + steps], last)
            ys.append(y)
        return b"".join(array.tobytes() for array in (np.concatenate(ys, axis=1), *last))

    report.row(
        "Shapes of a run that give the same bits (sets of the same bits between slashes)",
        {
            "model": name,
            "rows of a batch, one step": "/".join(classes(BATCHES, by_batch)),
            "place in 64 rows": "/".join(classes((0, 1, 31, 63), by_place)),
            "steps of a chunk, 4 rows": "/".join(classes(CHUNKS, by_chunk)),
        },
    )


@pytest.mark.parametrize("shape", [(1, 1), (64, 1), (4, 32)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_the_same_run_gives_the_same_bits_again(
    name: str, shape: tuple[int, int], provider: Provider, opened: Open
) -> None:
    runtime = opened(name, provider)
    x, states = random_inputs(runtime.signature, *shape, np.random.default_rng(4))
    assert len({first_row(*run(runtime, x, states)) for _ in range(50)}) == 1


def test_a_model_that_is_not_proved_is_run_one_row_and_one_step_at_a_time(
    name: str, server: Server, execution_provider: str, reference: Reference, report: Report
) -> None:
    with Client(server.url) as client:
        told = client.model(name)
        assert told["provider"] == execution_provider
        client.predict(name, [*reference.x[:, :40]])
        with client.session(name) as session:
            session.step(reference.x[0, :40])
    with server.client() as asked:
        metrics = asked.get("/metrics").text
    ticks = figure(metrics, "cellserve_tick_rows_count", name)
    single = figure(metrics, "cellserve_tick_rows_bucket", name, 'le="1.0"')
    steps = figure(metrics, "cellserve_steps_total", name)
    report.row(
        "How it is served",
        {"model": name, "exact": told["exact"], "steps": steps, "ticks": ticks, "of one row": single},
    )
    assert steps >= 5 * 40
    assert told["exact"] or ticks == single == steps
    assert not told["exact"] or ticks < steps


def run(runtime: Runtime, x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
    return runtime.run(np.ascontiguousarray(x), np.full(len(x), x.shape[1], np.int32), states)


def first_row(y: Array, final: list[Array]) -> bytes:
    return b"".join(array[0].tobytes() for array in (y, *final))


def classes(sizes: Sequence[int], bits: Callable[[int], Hashable]) -> list[str]:
    """Gives the sizes that give the same bits together, each set as text."""
    sets: dict[Hashable, list[str]] = {}
    for size in sizes:
        sets.setdefault(bits(size), []).append(str(size))
    return [" ".join(together) for together in sets.values()]


def figure(metrics: str, family: str, model: str, *labels: str) -> float:
    """Reads one model's number from Prometheus's text."""
    for line in metrics.splitlines():
        if line.startswith(f"{family}{{") and f'model="{model}"' in line and all(label in line for label in labels):
            return float(re.split(r"\s+", line)[-1])
    raise AssertionError(f"no {family} of {model} in the metrics")
