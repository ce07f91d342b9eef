"""Workers' metric files: prometheus-client adds up what we write with its private parts."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

# A worker keeps its files open until it exits.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CHANGED = (
    f"prometheus-client {importlib.metadata.version('prometheus-client')} has changed private parts that "
    "service/observability/prometheus_multiprocess.py uses: adapt that file, then the range in pyproject.toml"
)

try:
    from cellserve.service.observability.prometheus_multiprocess import MultiprocessFiles
except ImportError as error:
    pytest.fail(f"{CHANGED} ({error})", pytrace=False)


def families(steps: float) -> Iterator[Metric]:
    counter = CounterMetricFamily("steps", "Steps.", labels=["model"])
    counter.add_metric(["lstm"], steps)
    yield counter
    yield GaugeMetricFamily("open", "Open sockets.", steps)
    histogram = HistogramMetricFamily("seconds", "Durations.")
    histogram.add_metric([], [("0.1", steps), ("1.0", 2 * steps), ("+Inf", 3 * steps)], 10 * steps)
    yield histogram


def totals(files: MultiprocessFiles) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels.get("le", "")): sample.value
        for family in files.collector().collect()  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


def test_the_metrics_of_all_workers_are_summed(tmp_path: Path) -> None:
    one, two = MultiprocessFiles(tmp_path), MultiprocessFiles(tmp_path)
    try:
        list(one.write(families(5)))
        list(one.write(families(7)))  # replaces what it wrote before
        list(two.write(families(100)))
        found = totals(one)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        pytest.fail(f"{CHANGED} ({error!r})")
    assert found == {
        ("steps_total", ""): 107,
        ("open", ""): 107,
        ("seconds_bucket", "0.1"): 107,
        ("seconds_bucket", "1.0"): 214,
        ("seconds_bucket", "+Inf"): 321,
        ("seconds_count", ""): 321,
        ("seconds_sum", ""): 1070,
    }, CHANGED


def test_a_dead_worker_keeps_its_counters_and_loses_its_gauges(tmp_path: Path) -> None:
    ours = MultiprocessFiles(tmp_path)
    list(ours.write(families(1)))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for file in list(tmp_path.glob(f"*_{os.getpid()}-*.db")):
        file.rename(file.with_name(file.name.replace(str(os.getpid()), str(dead.pid))))
    found = totals(ours)
    assert found[("steps_total", "")] == 1, CHANGED
    assert ("open", "") not in found, CHANGED
