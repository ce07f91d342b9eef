"""The files of prometheus-client's multiprocess mode, written from our own counters.

The only file that uses private parts of prometheus-client: `mmap_dict`, which its multiprocess mode writes and reads,
and the format of its keys. Its own values would cost a write to a file for each count; ours are written once a second.
pyproject.toml pins the version these parts were tested with; tests/service/test_prometheus_multiprocess.py checks them.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_LIVE_MODES = {"process_start_time_seconds": "livemin", "process_max_fds": "livemin"}  # others: the sum over workers


class MultiprocessFiles:
    """The metric files of all workers, one per worker and metric type. Files of dead workers still count.

    Args:
        directory: The directory shared by the workers.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"  # unique even if a dead worker's process id is reused
        self._open: dict[str, MmapedDict] = {}
        self._keys: dict[Any, str] = {}

    def write(self, families: Iterable[Metric]) -> Iterator[None]:
        """Writes this worker's metrics, a sample at each step of the iterator."""
        now = time.time()
        for family in families:
            kind = family.type
            if kind == "gauge":
                kind += "_" + _LIVE_MODES.get(family.name, "livesum")
            if kind not in self._open:
                file = self._directory / f"{kind}_{self._name}.new"
                self._open[kind] = MmapedDict(str(file))
                file.rename(file.with_suffix(".db"))  # so that readers see only initialized files
            for name, labels, value in _split_buckets(family):
                key = self._keys.get((name, *labels.items()))
                if key is None:
                    key = mmap_key(family.name, name, list(labels), list(labels.values()), family.documentation)
                    self._keys[(name, *labels.items())] = key
                self._open[kind].write_value(key, value, now)
                yield

    def collector(self) -> MultiProcessCollector:
        """Returns a collector of the sums over all workers, without the gauges of dead ones."""
        for file in self._directory.glob("gauge_*.db"):
            name = file.stem.rpartition("_")[2]
            try:
                os.kill(int(name.partition("-")[0]), 0)
            except ProcessLookupError:
                mark_process_dead(name, str(self._directory))
        return MultiProcessCollector(None, str(self._directory))


def _split_buckets(family: Metric) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yields a family's samples as the files hold them: buckets that are not cumulative, and no histogram counts."""
    below = 0.0
    for sample in family.samples:
        if family.type != "histogram":
            yield sample.name, sample.labels, sample.value
        elif sample.name.endswith("_bucket"):
            yield sample.name, sample.labels, sample.value - below
            below = 0.0 if sample.labels["le"] == "+Inf" else sample.value
        elif sample.name.endswith("_sum"):
            yield sample.name, sample.labels, sample.value
