"""Exports without the measuring that takes them their seconds and lets the machine's mood choose the form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cellserve.export import exporter
from cellserve.export.candidates import candidates
from cellserve.export.verify import benchmark


@contextmanager
def unmeasured(without_step: Collection[str] = ()) -> Iterator[None]:
    """Every form takes as long as every other: the first exact one is chosen, with a graph for single steps.

    Args:
        without_step: Names of models that get none.
    """

    def microseconds(run: Callable[[], Any], seconds: float = 0.0) -> float:
        run()
        return 1.0

    def side_by_side(network: Any, *runtimes: Any) -> tuple[dict[str, dict[str, float | None]], str]:
        names = ("tf2onnx", "ours", "float32", "keras") if len(runtimes) > 1 else ("tf2onnx", "ours", "keras")
        shapes = benchmark.shapes(runtimes[0].signature)
        return {f"{batch}x{steps}": dict.fromkeys(names, 1.0) for batch, steps in shapes}, "Loop"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "microseconds", microseconds)
        patch.setattr(exporter, "side_by_side", side_by_side)
        patch.setattr(candidates, "_step_is_faster", lambda model, step, document: document.name not in without_step)
        yield
