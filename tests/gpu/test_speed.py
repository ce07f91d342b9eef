"""Steps a second on the provider beside the CPU, in one run, from host memory to host memory as the service runs them.

Nothing here is asserted: machines differ. The table is what docs/how-to/gpu.md is written from.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import pytest

from cellserve.service.runtime.batch_invariance import random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.providers import Provider
from tests.gpu.conftest import Open
from tests.gpu.report import Report

ROWS = (1, 4, 16, 64, 256, 1024)
STEPS = (1, 32)  # of a run: a session's step, and the most that a run of the service takes of a row
SECONDS = 0.25  # a measurement, at least; a run that takes longer is measured once
LONGEST = 3.0  # seconds of a run that is worth the time of the machine


@pytest.mark.parametrize("steps", STEPS)
def test_steps_a_second_are_measured(name: str, steps: int, provider: Provider, opened: Open, report: Report) -> None:
    runtimes = {f"on {provider}": opened(name, provider), "on the CPU, one thread": opened(name, "cpu")}
    runtimes["on the CPU, a thread a core"] = opened(name, "cpu", os.cpu_count() or 1)
    taken = dict.fromkeys(runtimes, 0.0)  # seconds of a run
    before = 1
    for rows in ROWS:
        for where, runtime in runtimes.items():
            too_long = taken[where] * rows / before > LONGEST  # were it to grow with the rows
            taken[where] = np.inf if too_long else measured(runtime, rows, steps)
        ours, *cpu = taken.values()
        report.row(
            f"Steps a second, runs of {steps} step{'s' if steps > 1 else ''}",
            {
                "model": name,
                "rows": rows,
                **{where: shown(rows * steps / seconds) for where, seconds in taken.items()},
                f"microseconds a run on {provider}": shown(1e6 * ours),
                "times the faster CPU": f"{min(cpu) / ours:.2f}" if max(ours, *cpu) < np.inf else "-",
            },
        )
        before = rows


def measured(runtime: Runtime, rows: int, steps: int) -> float:
    """Gives the seconds of a run of this shape, the fastest of what a quarter of a second has room for."""
    x, states = random_inputs(runtime.signature, rows, steps, np.random.default_rng(8))
    lengths = np.full(rows, steps, np.int32)
    best = timed(lambda: runtime.run(x, lengths, states))  # the first run of a shape also allocates
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end - best:
        best = min(best, timed(lambda: runtime.run(x, lengths, states)))
    return best


def shown(number: float) -> str:
    return f"{number:,.0f}" if 0 < number < np.inf else "-"  # what was not measured


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
