"""Exports with the short proof and without measuring: that takes seconds, and lets the machine choose the form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cellserve.models.tensorflow_import import import_tensorflow

# Before the modules that import it: every test has TensorFlow as the commands do, whose bits no processor changes.
import_tensorflow()

from cellserve.export import exporter  # noqa: E402
from cellserve.export.adopt import adopt  # noqa: E402
from cellserve.export.candidates import candidates  # noqa: E402
from cellserve.export.verify import benchmark  # noqa: E402
from cellserve.service.runtime.batch_invariance import QUICK_PLAN  # noqa: E402


@contextmanager
def unmeasured(without_step: Collection[str] = ()) -> Iterator[None]:
    """Every form takes as long as every other: the first exact one is chosen, with a graph for single steps.

    Args:
        without_step: Names of models that get none.
    """

    def microseconds(run: Callable[[], Any]) -> float:
        run()
        return 1.0

    def unmade(network: Any) -> benchmark.Alternatives:
        return benchmark.Alternatives(dict.fromkeys(("tf2onnx", "keras"), lambda x, states: lambda: None), "Loop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "microseconds", microseconds)
        patch.setattr(exporter, "alternatives", unmade)
        patch.setattr(candidates, "FULL_PLAN", QUICK_PLAN)
        patch.setattr(adopt, "FULL_PLAN", QUICK_PLAN)
        patch.setattr(candidates, "_step_is_faster", lambda model, step, document: document.name not in without_step)
        yield
