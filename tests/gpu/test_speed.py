"""Steps a second on the provider beside the CPU, in one run, from host memory to host memory as the service runs them.

Nothing here is asserted: machines differ. The table is what docs/gpu.md is written from.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import pytest

from service.exactness import draw
from service.runtime import Provider, Runtime
from tests.gpu.conftest import Open
from tests.gpu.report import Report

ROWS = (1, 4, 16, 64, 256, 1024)
STEPS = (1, 32)  # of a run: a session's step, and the most that a run of the service takes of a row
SECONDS = 0.25  # a measurement, at least; a run that takes longer is measured once


@pytest.mark.parametrize("steps", STEPS)
def test_steps_a_second_are_measured(name: str, steps: int, provider: Provider, opened: Open, report: Report) -> None:
    for rows in ROWS:
        ours, cpu = (measured(opened(name, on), rows, steps) for on in (provider, "cpu"))
        all_cores = measured(opened(name, "cpu", os.cpu_count() or 1), rows, steps)
        report.row(
            f"Steps a second, runs of {steps} step{'s' if steps > 1 else ''}",
            {
                "model": name,
                "rows": rows,
                f"on {provider}": f"{ours:,.0f}",
                "microseconds a run": f"{1e6 * rows * steps / ours:,.0f}",
                "CPU, one thread": f"{cpu:,.0f}",
                "CPU, a thread a core": f"{all_cores:,.0f}",
                "beside the faster CPU": f"{ours / max(cpu, all_cores):.2f}",
            },
        )


def measured(runtime: Runtime, rows: int, steps: int) -> float:
    """Gives the row-steps a second of runs of this shape, the fastest of what a quarter of a second has room for."""
    x, states = draw(runtime.signature, rows, steps, np.random.default_rng(8))
    lengths = np.full(rows, steps, np.int32)
    best = timed(lambda: runtime.run(x, lengths, states))  # the first run of a shape also allocates
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end - best:
        best = min(best, timed(lambda: runtime.run(x, lengths, states)))
    return rows * steps / best


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
