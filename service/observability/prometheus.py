"""`/metrics`: what is counted, with the names and in the form of Prometheus.

With several workers each writes its numbers to files that prometheus-client can add up (its multiprocess mode), once a
second and when it is asked itself: whichever worker is asked tells of all of them, and of those that were.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.stats import Distribution
from cellserve.service.errors import StoreAway
from cellserve.service.observability.counters import Counts
from cellserve.service.sessions.stores.protocol import SessionStore
from cellserve.service.sessions.writer import SessionWriter

log = logging.getLogger("cellserve")

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4
DIRECTORY = "CELLSERVE_METRICS_DIRECTORY"  # where workers meet; `cellserve serve` makes and removes it
_LIVE_MODES = {"process_start_time_seconds": "livemin", "process_max_fds": "livemin"}  # others: the sum over workers


class Metrics:
    """What `/metrics` answers.

    Args:
        counts: Of the process.
        engines: Returns those that are loaded.
        sessions: Where they are kept.
        writer: Changes them.
        workers: Processes that answer together.
    """

    def __init__(
        self,
        counts: Counts,
        engines: Callable[[], Iterable[Engine]],
        sessions: SessionStore,
        writer: SessionWriter,
        workers: int,
    ) -> None:
        self._sessions = sessions
        self._own = _Own(counts, engines, sessions, writer)
        directory = os.environ.get(DIRECTORY) if workers > 1 else None
        self._files = None if directory is None else _Files(Path(directory))

    def keep_up(self) -> None:
        """Tells the other workers."""
        if self._files is not None:
            try:
                self._files.write(self._own.collect())
            except OSError as error:
                self._files = None
                log.error("/metrics of this worker tells of this one alone from now on: %s", error)

    async def text(self) -> bytes:
        """Gives all of it in Prometheus's text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Given(await self._of_all()))
        self.keep_up()
        registry.register(self._own if self._files is None else self._files.all())
        return generate_latest(registry)

    async def _of_all(self) -> list[Metric]:
        """Gives what every worker tells alike."""
        versions = {"version": importlib.metadata.version("cellserve"), "runtime": _runtime_version()}
        build = GaugeMetricFamily("cellserve_build_info", "What runs here.", labels=list(versions))
        build.add_metric(list(versions.values()), 1)
        try:
            live = await self._sessions.count()
        except StoreAway:
            return [build]
        return [build, GaugeMetricFamily("cellserve_sessions", "Live sessions; of a shared store, all of its.", live)]


class _Given(Collector):
    """What has been collected already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


class _Own(Collector):
    """What this process has counted."""

    def __init__(
        self, counts: Counts, engines: Callable[[], Iterable[Engine]], sessions: SessionStore, writer: SessionWriter
    ) -> None:
        self._counts, self._engines, self._sessions, self._writer = counts, engines, sessions, writer
        self._process = ProcessCollector(registry=None)

    def collect(self) -> Iterator[Metric]:
        yield from self._process.collect()
        yield from self._of_surfaces()
        yield from self._of_engines()
        yield from self._of_sessions()

    def _of_surfaces(self) -> Iterator[Metric]:
        counts = self._counts
        requests = CounterMetricFamily(
            "cellserve_requests", "Requests and frames that were answered.", labels=["surface", "status"]
        )
        problems = CounterMetricFamily(
            "cellserve_problems", "Problem documents that were answered.", labels=["surface", "problem"]
        )
        seconds = HistogramMetricFamily(
            "cellserve_request_duration_seconds", "From a request to its answer.", labels=["surface"]
        )
        for name, surface in counts.surfaces.items():
            for status, count in surface.statuses.items():
                requests.add_metric([name, str(status)], count)
            for kind, count in surface.problems.items():
                problems.add_metric([name, kind], count)
            _add(seconds, [name], surface.seconds)
        yield from (requests, problems, seconds)
        yield GaugeMetricFamily("cellserve_sockets", "WebSockets that are open.", counts.sockets)

    def _of_engines(self) -> Iterator[Metric]:
        engines = [([engine.model.name, str(engine.model.version)], engine) for engine in self._engines()]
        labels = ["model", "version"]
        stages = HistogramMetricFamily(
            "cellserve_stage_duration_seconds",
            "Of each advance's wait for a tick (queue), of each tick's run (run) and its write to the store (store).",
            labels=[*labels, "stage"],
        )
        rows = HistogramMetricFamily("cellserve_tick_rows", "Rows of a tick: the batch size.", labels=labels)
        for values, engine in engines:
            counts = engine.counts
            _add(stages, [*values, "queue"], counts.queue)
            _add(stages, [*values, "run"], counts.run)
            if self._sessions.durable == "store":
                _add(stages, [*values, "store"], counts.store)
            _add(rows, values, counts.rows)
        yield from (stages, rows)
        numbers: Sequence[tuple[type[Metric], str, str, Callable[[Any], float]]] = (
            (CounterMetricFamily, "steps", "Time steps that were run.", lambda one: one.counts.steps),
            (CounterMetricFamily, "padding_steps", "Time steps that were run beside them, as rows of a tick differ in "
             "length.", lambda one: one.counts.padding),
            (CounterMetricFamily, "ticks_rerun", "Ticks that failed and were run again row by row.",
             lambda one: one.counts.rerun),
            (CounterMetricFamily, "ticks_failed", "Ticks that could not be made at all.",
             lambda one: one.counts.failed),
            (GaugeMetricFamily, "queued_steps", "Time steps that wait to be run.", lambda one: one.queued),
            (GaugeMetricFamily, "slots", "Slots of the arena in use: sessions held here, and sequences under way.",
             lambda one: one.arena.taken),
        )  # fmt: skip
        for kind, name, told, read in numbers:
            family: Any = kind(f"cellserve_{name}", told, labels=labels)  # type: ignore[call-arg]
            for values, engine in engines:
                family.add_metric(values, read(engine))
            yield family

    def _of_sessions(self) -> Iterator[Metric]:
        store, counts = self._sessions, self._counts
        yield CounterMetricFamily("cellserve_sessions_created", "Sessions made, forks too.", store.created)
        ended = CounterMetricFamily("cellserve_sessions_ended", "Sessions that are gone.", labels=["reason"])
        for reason, count in store.ended.items():
            ended.add_metric([reason], count)
        yield ended
        yield CounterMetricFamily(
            "cellserve_replays", "Repeated changes that were told their answer again.", self._writer.replays
        )
        yield CounterMetricFamily(
            "cellserve_store_errors", "Calls that the store did not answer.", self._sessions.errors
        )
        snapshots = HistogramMetricFamily("cellserve_snapshot_duration_seconds", "Of writing a snapshot.", labels=[])
        _add(snapshots, [], counts.snapshots)
        yield snapshots
        yield CounterMetricFamily(
            "cellserve_snapshot_errors", "Snapshots that could not be written.", counts.snapshot_errors
        )


class _Files:
    """The files of all workers, one of each type of metric; those of workers that are gone are counted on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"  # a process may get the id of one that is gone
        self._open: dict[str, MmapedDict] = {}
        self._keys: dict[Any, str] = {}

    def write(self, families: Iterable[Metric]) -> None:
        """Writes what this worker has counted."""
        now = time.time()
        for family in families:
            kind = family.type
            if kind == "gauge":
                kind += "_" + _LIVE_MODES.get(family.name, "livesum")
            if kind not in self._open:
                file = self._directory / f"{kind}_{self._name}.new"
                self._open[kind] = MmapedDict(str(file))
                file.rename(file.with_suffix(".db"))  # readers see no file that is being made
            for name, labels, value in _apart(family):
                key = self._keys.get((name, *labels.items()))
                if key is None:
                    key = mmap_key(family.name, name, list(labels), list(labels.values()), family.documentation)
                    self._keys[(name, *labels.items())] = key
                self._open[kind].write_value(key, value, now)

    def all(self) -> MultiProcessCollector:
        """Gives what adds all of them up, without the gauges of workers that are gone."""
        for file in self._directory.glob("gauge_*.db"):
            name = file.stem.rpartition("_")[2]
            try:
                os.kill(int(name.partition("-")[0]), 0)
            except ProcessLookupError:
                mark_process_dead(name, str(self._directory))
        return MultiProcessCollector(None, str(self._directory))


def _apart(family: Metric) -> Iterator[tuple[str, dict[str, str], float]]:
    """Gives a family's samples as files have them: each bucket without those below it, and no counts."""
    below = 0.0
    for sample in family.samples:
        if family.type != "histogram":
            yield sample.name, sample.labels, sample.value
        elif sample.name.endswith("_bucket"):
            yield sample.name, sample.labels, sample.value - below
            below = 0.0 if sample.labels["le"] == "+Inf" else sample.value
        elif sample.name.endswith("_sum"):
            yield sample.name, sample.labels, sample.value


def _add(family: HistogramMetricFamily, labels: list[str], distribution: Distribution) -> None:
    counts, total = distribution.read()
    bounds = [floatToGoString(bound) for bound in (*distribution.bounds, float("inf"))]
    reached, buckets = 0, []
    for bound, count in zip(bounds, counts, strict=True):
        reached += count
        buckets.append((bound, reached))
    family.add_metric(labels, buckets, total)


def _runtime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
