"""What a model is for: by its outputs, and by what is said of it."""

from __future__ import annotations

import pytest

from cellserve.models.signature import Rollout, Signature, Task, TensorSpec, natural_task, task_misfit


def signature(x: tuple[int, ...] = (1,), y: tuple[int, ...] = (1,), outputs: int = 1) -> Signature:
    given = tuple(TensorSpec(name=f"y{place}", shape=y) for place in range(outputs))
    return Signature(inputs=(TensorSpec(name="x", shape=x),), outputs=given, states=())


@pytest.mark.parametrize(
    ("labels", "rollout", "told", "task"),
    [
        (None, "value", signature(), "forecast"),
        (None, "value", signature((3, 3), (3, 3)), None),
        (("no", "yes"), None, signature(y=(2,)), "classify"),
        (("a", "b"), "logits", signature(y=(2,)), "text"),
        (("a", "bc"), "probabilities", signature(y=(2,)), None),
        (None, "probabilities", signature(y=(2,)), None),
        (None, None, signature(), None),
        (("no", "yes"), None, signature(y=(2,), outputs=2), None),
    ],
)
def test_the_task_of_a_model_follows_from_its_outputs(
    labels: tuple[str, ...] | None, rollout: Rollout | None, told: Signature, task: Task | None
) -> None:
    assert natural_task(told, labels, rollout) == task
    assert task_misfit(task, None, told, labels, rollout) is None


@pytest.mark.parametrize(
    ("task", "rate", "told", "why"),
    [
        ("audio", None, signature((512,)), "an audio model has a sample rate"),
        ("classify", 16000, signature(), "no other model has one"),
        (None, 16000, signature(), "no other model has one"),
        ("forecast", None, signature(), "rollout: value"),
        ("text", None, signature(), "each label a character"),
        ("classify", None, signature(), "labels"),
        ("audio", 16000, signature((512, 2)), "one input of one axis"),
        ("audio", 16000, signature((512,), outputs=2), "one output"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_with_the_reason(
    task: Task | None, rate: int | None, told: Signature, why: str
) -> None:
    assert why in (task_misfit(task, rate, told, None, None) or "")
