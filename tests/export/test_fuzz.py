"""Seconds of the fuzzer, and minutes of it; `make fuzz` is the campaign."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from rich.console import Console

from tests.export import fuzz
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


def test_a_state_whose_sizes_alone_reach_another_state_is_exported() -> None:
    zeros_like_first = ["tanh", ["select_equal", "x@0", ["floor", "bias"]]]
    cell = {"next_states": [zeros_like_first, ["softsign", ["flipped", "s0"]]], "output": "s0"}
    body = [{"kind": "cells", "cells": [cell]}]
    plan = {"input": "float", "body": body, "residual": False, "backwards": None, "last": False, "numbers": []}
    assert examine(plan) == "exported"


def jumping() -> dict[str, Any]:
    """The plan of a network that is exported, of which rounding decides an output: `mod` of reciprocals jumps."""
    first = {"next_states": [["tanh", "x@0"]], "output": "s0"}
    second = {"next_states": [["tanh", ["mod", ["nan_to_num", "x@1"], "x@0"]]], "output": "s0"}
    body = [{"kind": "cells", "cells": [first, second]}]
    return {"input": "float", "body": body, "residual": False, "backwards": None, "last": False, "numbers": []}


def test_what_rounding_makes_of_keras_itself_is_not_called_wrong() -> None:
    assert examine(jumping()) == "exported"


def test_a_network_taken_apart_wrongly_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from cellserve.export.verify.reference import Reference
    from cellserve.service.runtime.onnx_model import Runtime

    compare = Reference.compare

    def blind(self: Any, runtime: Any) -> Any:
        return replace(compare(self, runtime), differences=())

    def shifted(self: Any, *given: Any) -> Any:
        y, states = run(self, *given)
        return y + np.float32(0.02), states

    run = Runtime.run
    monkeypatch.setattr(Reference, "compare", blind)
    monkeypatch.setattr(Runtime, "run", shifted)
    with pytest.raises(AssertionError, match=r"differs from model\.predict"):
        examine(jumping())


def test_the_fuzzer_goes_on_after_a_wrong_network_and_saves_each_as_drawn_and_shrunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int] = []

    def wrong_at_times(plan: dict[str, Any]) -> str:
        tried.append(len(plan["body"]))
        if len(plan["body"]) > 1:
            raise AssertionError("numbers differ")
        return "exported"

    monkeypatch.setattr(fuzz, "examine", wrong_at_times)
    fuzz._work(8, 1, tmp_path / "0.jsonl")
    results = fuzz._read([tmp_path / "0.jsonl"])
    assert len(results) == 8
    wrong = [each for each in results if each["result"].startswith("wrong: AssertionError: numbers differ")]
    assert len(wrong) > 1
    saved = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert [len(each["body"]) for each in saved] == [2] * len(wrong)
    assert len(list(tmp_path.glob("*.keras"))) == len(wrong)
    drawn = [json.loads(path.read_text()) for path in tmp_path.glob("*.drawn")]
    assert all(each["plan"] in drawn for each in wrong)
    assert len(drawn) == len(wrong)
    assert fuzz._report(Console(), results, 1.0, [0]) == 1
    told = capsys.readouterr().out
    assert all(word in told for word in ("tried", "exported", "wrong", "numbers differ", "of the causal ones"))
