"""Seconds of the fuzzer, and minutes of it; `make fuzz` is the campaign."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.export.fuzz import ENOUGH, examine
from tests.export.random_networks import is_causal, networks


@pytest.mark.parametrize("count", [4, pytest.param(30, marks=pytest.mark.long)])
def test_random_networks_are_exported_as_keras_has_them_or_refused_for_a_true_reason(count: int) -> None:
    results: list[tuple[bool, str]] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(networks())
    def run(plan: dict[str, Any]) -> None:
        results.append((is_causal(plan), examine(plan)))

    run()
    causal = [result for is_one, result in results if is_one]
    assert sum(result == "exported" for result in causal) >= ENOUGH * len(causal), causal
