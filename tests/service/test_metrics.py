"""`/metrics` of many models: written in turns with others, and the same as if it were written at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from cellserve.service.observability.prometheus import Metrics

BOUNDS = [*map(str, range(24)), "+Inf"]


class Families:
    """Families of many models, some of them in parts."""

    def collect(self) -> Iterator[Metric]:
        for model in range(50):
            seconds = HistogramMetricFamily("seconds", "Durations.", labels=["model"])
            seconds.add_metric([f"m{model}"], [(bound, model) for bound in BOUNDS], model)
            yield seconds
        yield CounterMetricFamily("nothing", "No samples.", labels=["model"])
        steps = CounterMetricFamily("steps", "Steps.", labels=["model"])
        for model in range(250):
            steps.add_metric([f"m{model}"], model)
        yield steps


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Metrics:
    nothing: Any = None
    metrics = Metrics(nothing, nothing, nothing, nothing, 1)

    async def shared() -> list[Metric]:
        return []

    monkeypatch.setattr(metrics, "_process", Families())
    monkeypatch.setattr(metrics, "_shared", shared)
    return metrics


async def _beside(work: Any) -> tuple[Any, int]:
    """Returns what work returns, and how many turns others had meanwhile."""
    task, turns = asyncio.ensure_future(work), 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    return task.result(), turns


def test_the_text_of_many_models_is_written_in_turns_with_others(metrics: Metrics) -> None:
    text, turns = asyncio.run(_beside(metrics.text()))
    samples = [family.samples for family in Families().collect()]
    assert turns > sum(map(len, samples)) / 100
    expected: dict[str, Metric] = {}
    for family in Families().collect():
        known = expected.setdefault(family.name, family)
        if known is not family:
            known.samples += family.samples
    assert text == b"".join(generate_latest(_One(family)) for family in expected.values())


def test_requests_for_metrics_take_turns(metrics: Metrics) -> None:
    async def many() -> int:
        started: list[int] = []
        collect = metrics._process.collect

        def counted() -> Iterator[Metric]:
            started.append(1)
            yield from collect()

        metrics._process.collect = counted  # type: ignore[method-assign]
        asking = [asyncio.create_task(metrics.samples()) for _ in range(20)]
        for _ in range(50):
            await asyncio.sleep(0)
        begun = len(started)
        answers = await asyncio.gather(*asking)
        assert all(answer == answers[0] for answer in answers)
        return begun

    assert asyncio.run(many()) == 1


class _One:
    """A collector of one family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> list[Metric]:
        return [self._family]
