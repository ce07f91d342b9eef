"""Padded runs: the results of the rows that were asked for, whatever is added, and bits that stay the same."""

from __future__ import annotations

import numpy as np
import pytest

from cellserve.service.runtime.batch_invariance import FULL_PLAN, QUICK_PLAN, check_batch_invariance, find_shapes
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.shape_policy import ANY_SHAPE, ONE_BY_ONE, POLICIES, ShapePolicy, policies_from
from tests import foreign
from tests.kinds import DEEP, KINDS


@pytest.mark.parametrize(
    ("policy", "shapes"),
    [
        (ShapePolicy("", multiple=8), {(1, 1): (8, 1), (8, 3): (8, 3), (9, 3): (16, 3)}),
        (ShapePolicy("", guard_rows=8), {(1, 1): (9, 1), (8, 3): (16, 3)}),
        (ShapePolicy("", row_sizes=(8, 64), step_sizes=(1, 8)), {(1, 1): (8, 1), (9, 2): (64, 8), (65, 9): (128, 16)}),
    ],
)
def test_shapes_are_padded_as_the_policy_says(
    policy: ShapePolicy, shapes: dict[tuple[int, int], tuple[int, int]]
) -> None:
    assert {shape: policy.padded(*shape) for shape in shapes} == shapes


@pytest.mark.parametrize("policy", POLICIES[1:], ids=lambda policy: policy.name)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_result_of_any_kind_of_model(kind: str, policy: ShapePolicy) -> None:
    runtime = Runtime(foreign.described(*KINDS[kind]))
    if runtime.signature.batch is not None or runtime.signature.predict_only:
        policy = ANY_SHAPE  # as `find_shapes` has it
    runtime.shapes = policy
    exactness = check_batch_invariance([runtime], QUICK_PLAN)
    assert exactness.proved, exactness.why


@pytest.mark.parametrize("width", [3, 33])
@pytest.mark.parametrize("operator", ["Softplus", "Elu", "Log", "Sin"])
def test_kernels_whose_bits_depend_on_the_batch_are_exact_in_padded_shapes(operator: str, width: int) -> None:
    made = foreign.described(*foreign.elementwise(operator, width))
    runtime = Runtime(made)
    exactness = find_shapes([runtime], FULL_PLAN)
    assert exactness.proved, exactness.why
    assert runtime.shapes.name == exactness.shapes
    again = Runtime(made)
    assert find_shapes([again], QUICK_PLAN, policies_from(exactness.shapes)).shapes == exactness.shapes


def test_a_model_for_which_no_shapes_hold_is_not_exact_and_runs_as_it_is() -> None:
    runtime = Runtime(foreign.described(foreign.deep(mixed=True), DEEP))
    exactness = find_shapes([runtime], QUICK_PLAN)
    assert (exactness.proved, exactness.shapes) == (False, ONE_BY_ONE)
    assert runtime.shapes is ANY_SHAPE
    assert not policies_from(ONE_BY_ONE)
    x = np.ones((2, 1, 3), np.float32)
    assert runtime.run(x, np.ones(2, np.int32), runtime.zeros(2))[0].shape[0] == 2
