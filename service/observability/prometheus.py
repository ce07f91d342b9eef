"""`/metrics`: the counters of the process as Prometheus metrics, in text or in JSON.

With several workers, each writes its metrics to files once a second and at each scrape, and the worker that is scraped
answers the sum over all workers, past ones included.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cellserve.service.engine.engine import Engine
from cellserve.service.engine.stats import Histogram
from cellserve.service.errors import StoreUnavailable
from cellserve.service.observability.counters import Counts
from cellserve.service.observability.prometheus_multiprocess import MultiprocessFiles
from cellserve.service.sessions.stores.protocol import SessionStore, StoreFiles
from cellserve.service.sessions.writer import SessionWriter

_PIECE = 100  # samples that are written at once: 2 ms

log = logging.getLogger("cellserve")

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4
DIRECTORY = "CELLSERVE_METRICS_DIRECTORY"  # the workers' shared directory; `cellserve serve` creates and removes it


class Metrics:
    """The content of `/metrics`.

    Args:
        counts: The process's counters.
        engines: Returns the loaded engines.
        sessions: The session store.
        writer: The session writer.
        workers: The number of processes of this server.
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
        self._process = _ProcessCollector(counts, engines, sessions, writer)
        directory = os.environ.get(DIRECTORY) if workers > 1 else None
        self._files = None if directory is None else MultiprocessFiles(Path(directory))
        self._turn = asyncio.Lock()  # of one request at a time

    async def publish(self) -> None:
        """Writes this worker's metrics for the other workers to read; others have turns between."""
        async with self._turn:
            await self._publish()

    async def _publish(self) -> None:
        if self._files is not None:
            try:
                for count, _ in enumerate(self._files.write(self._process.collect()), 1):
                    if count % _PIECE == 0:
                        await asyncio.sleep(0)
            except OSError as error:
                self._files = None
                log.error("this worker cannot share its metrics: its /metrics covers it alone from now on: %s", error)

    async def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        parts: list[bytes] = []

        def add(piece: Metric, is_first: bool) -> None:
            text = generate_latest(_MergedCollector([piece]))
            parts.append(text if is_first else text.split(b"\n", 2)[2])  # without HELP and TYPE

        await self._each(add)
        return b"".join(parts)

    async def samples(self) -> dict[str, list[dict[str, Any]]]:
        """Returns all metrics for JSON: by a sample's name in the text format, its labels and values."""
        by_name: dict[str, list[dict[str, Any]]] = {}

        def add(piece: Metric, is_first: bool) -> None:
            for sample in piece.samples:
                by_name.setdefault(sample.name, []).append({"labels": sample.labels, "value": sample.value})

        await self._each(add)
        return by_name

    async def _each(self, use: Callable[[Metric, bool], None]) -> None:
        """Calls `use` with pieces of all families, and whether each is a family's first; others have turns between."""
        async with self._turn:
            shared = await self._shared()
            await self._publish()
            own = self._process if self._files is None else self._files.collector()
            families = own.collect() if self._files is None else await asyncio.to_thread(lambda: list(own.collect()))
            last = ""
            for family in chain(shared, families):
                for start in range(0, max(len(family.samples), 1), _PIECE):
                    piece = Metric(family.name, family.documentation, family.type)
                    piece.samples = family.samples[start : start + _PIECE]
                    use(piece, family.name != last)
                    last = family.name
                    await asyncio.sleep(0)

    async def _shared(self) -> list[Metric]:
        """Returns the metrics that are the same in every worker, and so must not be summed."""
        versions = _versions()
        build = GaugeMetricFamily("cellserve_build_info", "What runs here.", labels=list(versions))
        build.add_metric(list(versions.values()), 1)
        shared = [build, *_of_files(self._sessions.files())]
        try:
            live = await self._sessions.count()
        except StoreUnavailable:
            return shared
        return [
            *shared,
            GaugeMetricFamily("cellserve_sessions", "Live sessions; with a shared store, all of its.", live),
        ]


class _MergedCollector(Collector):
    """Metric families that have been collected already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


class _ProcessCollector(Collector):
    """The metrics of this process."""

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
        for values, engine in engines:  # a part for each, so that thousands of samples are not made at once
            counts = engine.counts
            stages = HistogramMetricFamily(
                "cellserve_stage_duration_seconds",
                "Of each advance's wait for a tick (queue), of each tick's run (run) and its write to the store "
                "(store).",
                labels=[*labels, "stage"],
            )
            _add(stages, [*values, "queue"], counts.queue)
            _add(stages, [*values, "run"], counts.run)
            if self._sessions.durable != "none":
                _add(stages, [*values, "store"], counts.store)
            yield stages
        for values, engine in engines:
            rows = HistogramMetricFamily("cellserve_tick_rows", "Rows of a tick: the batch size.", labels=labels)
            _add(rows, values, engine.counts.rows)
            yield rows
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
             lambda one: one.arena.in_use),
            (GaugeMetricFamily, "bits_may_differ", "Whether results may depend on the batch (--when-inexact batch).",
             lambda one: int(one.model.bits_may_differ)),
        )  # fmt: skip
        for kind, name, documentation, read in numbers:
            family: Any = kind(f"cellserve_{name}", documentation, labels=labels)  # type: ignore[call-arg]
            for values, engine in engines:
                family.add_metric(values, read(engine))
            yield family

    def _of_sessions(self) -> Iterator[Metric]:
        store = self._sessions
        yield CounterMetricFamily("cellserve_sessions_created", "Sessions made, forks too.", store.created)
        ended = CounterMetricFamily("cellserve_sessions_ended", "Sessions that are gone.", labels=["reason"])
        for reason, count in store.ended.items():
            ended.add_metric([reason], count)
        yield ended
        yield CounterMetricFamily(
            "cellserve_replays", "Repeated changes that got their stored answer again.", self._writer.replays
        )
        errors = CounterMetricFamily("cellserve_store_errors", "Calls to the store that failed.", labels=["reason"])
        for reason, count in store.errors.items():
            errors.add_metric([reason], count)
        yield errors
        yield CounterMetricFamily(
            "cellserve_unreadable_records", "Records of the store that were not those of a session.", store.unreadable
        )
        files = store.files()
        if files is not None:
            syncs = HistogramMetricFamily(
                "cellserve_store_sync_duration_seconds", "Of each sync of the store to disk.", labels=[]
            )
            _add(syncs, [], files.sync_seconds)
            yield syncs


def _of_files(files: StoreFiles | None) -> Iterator[Metric]:
    """Yields what a store has on this machine's disk."""
    if files is None:
        return
    yield GaugeMetricFamily("cellserve_store_used_bytes", "Bytes of the store that are in use.", files.used_bytes)
    yield GaugeMetricFamily("cellserve_store_file_bytes", "The store's files.", files.file_bytes)
    yield GaugeMetricFamily("cellserve_store_max_bytes", "The store's files, at most.", files.max_bytes)
    yield GaugeMetricFamily("cellserve_store_free_bytes", "What the store's disk has left.", files.free_bytes)
    yield GaugeMetricFamily("cellserve_store_readers", "Readers of the store's files, of all workers.", files.readers)
    if files.checkpoint_age is not None:
        yield GaugeMetricFamily(
            "cellserve_store_checkpoint_age_seconds", "Since the store's last checkpoint.", files.checkpoint_age
        )


def _add(family: HistogramMetricFamily, labels: list[str], distribution: Histogram) -> None:
    counts, total = distribution.read()
    bounds = [*(str(float(bound)) for bound in distribution.bounds), "+Inf"]
    reached, buckets = 0, []
    for bound, count in zip(bounds, counts, strict=True):
        reached += count
        buckets.append((bound, reached))
    family.add_metric(labels, buckets, total)


@cache
def _versions() -> dict[str, str]:
    """Returns the versions of what runs here; the first one takes milliseconds to find."""
    import onnxruntime

    return {"version": importlib.metadata.version("cellserve"), "runtime": str(onnxruntime.__version__)}
