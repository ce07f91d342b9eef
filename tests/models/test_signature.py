"""What a model's outputs must be to become its inputs."""

from __future__ import annotations

from typing import Any

import pytest

from cellserve.models.signature import Rollout, Signature, TensorSpec, rollout_misfit

NUMBERS = TensorSpec(name="x", shape=(3,))
SYMBOL = TensorSpec(name="x", dtype="int32", shape=(), bounds=(1, 4))


def signature(x: TensorSpec, shape: tuple[int, ...], **more: Any) -> Signature:
    return Signature(inputs=(x,), outputs=(TensorSpec(name="y", shape=shape),), states=(), **more)


@pytest.mark.parametrize("rollout", ["probabilities", "logits"])
def test_a_symbol_rollout_needs_one_output_entry_per_symbol(rollout: Rollout) -> None:
    assert rollout_misfit(signature(SYMBOL, (4,)), rollout) is None
    assert "must be numbers [4]" in str(rollout_misfit(signature(SYMBOL, (5,)), rollout))
    assert "one integer, with bounds" in str(rollout_misfit(signature(NUMBERS, (3,)), rollout))


def test_a_value_rollout_needs_an_output_of_the_inputs_shape() -> None:
    assert rollout_misfit(signature(NUMBERS, (3,)), "value") is None
    assert "shape [3]" in str(rollout_misfit(signature(NUMBERS, (2,)), "value"))
    assert "shape []" in str(rollout_misfit(signature(SYMBOL, ()), "value"))


def test_a_model_that_cannot_be_stepped_has_no_rollout() -> None:
    assert rollout_misfit(signature(NUMBERS, (3,), predict_only="it reads backwards"), "value")
    several = signature(NUMBERS, (3,)).model_copy(update={"inputs": (NUMBERS, SYMBOL)})
    assert "one input" in str(rollout_misfit(several, "value"))
