"""The protocol's statistics extension: requests of this protocol, and all runs of the model.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cellserve.service.engine.engine import Engine

_STAGES = ("queue", "compute_input", "compute_infer", "compute_output")


class Timing:
    """Timestamps of one request, in nanoseconds of `time.perf_counter_ns`."""

    __slots__ = ("decoded", "ran", "rows", "start")

    def __init__(self) -> None:
        self.start = time.perf_counter_ns()
        self.rows = 1  # batch size
        self.decoded = self.ran = self.start  # when the tensors, and the outputs, were available

    def decode_ended(self) -> None:
        """Records that the tensors are decoded."""
        self.decoded = self.ran = time.perf_counter_ns()

    def run_ended(self, rows: int) -> None:
        """Records that the outputs are available, for a batch of `rows`."""
        self.ran, self.rows = time.perf_counter_ns(), rows


class Statistics:
    """Counts and durations of one model's requests.

    Args:
        engine: The model's engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._model, self._counts = engine.model, engine.counts
        self._last = 0  # milliseconds since 1970
        self._inferences = 0
        self._success, self._fail = [0, 0], [0, 0]
        self._stages = [0] * len(_STAGES)  # nanoseconds, summed over successful requests

    @contextmanager
    def request(self, timing: Timing) -> Iterator[None]:
        """Counts a request, as failed if it raises."""
        before = self._counts.run_seconds
        try:
            yield
        except Exception:
            self._count(self._fail, time.perf_counter_ns() - timing.start)
            raise
        end = time.perf_counter_ns()
        waited = timing.ran - timing.decoded
        # The part of the wait in which the model ran, for any request; the rest is time in the queue.
        ran = min(waited, int(1e9 * (self._counts.run_seconds - before)))
        self._count(self._success, end - timing.start)
        for stage, took in enumerate((waited - ran, timing.decoded - timing.start, ran, end - timing.ran)):
            self._stages[stage] += took
        self._inferences += timing.rows
        self._last = time.time_ns() // 1_000_000

    def document(self) -> dict[str, Any]:
        """Returns the extension's JSON object for the model."""
        model, (succeeded, _) = self._model, self._success
        runs = {rows: (int(count), int(1e9 * took)) for rows, (count, took) in sorted(self._counts.by_rows.items())}
        stages = zip(_STAGES, self._stages, strict=True)
        nothing = _duration(0, 0)
        return {
            "name": model.name,
            "version": str(model.version),
            "last_inference": self._last,
            "inference_count": self._inferences,
            "execution_count": sum(count for count, _ in runs.values()),
            "inference_stats": {
                "success": _duration(*self._success),
                "fail": _duration(*self._fail),
                **{name: _duration(succeeded, took) for name, took in stages},
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": _duration(count, 0),
                    "compute_infer": _duration(count, took),
                    "compute_output": _duration(count, 0),
                }
                for rows, (count, took) in runs.items()
            ],
        }

    @staticmethod
    def _count(outcome: list[int], took: int) -> None:
        outcome[0] += 1
        outcome[1] += took


def _duration(count: int, took: int) -> dict[str, int]:
    return {"count": count, "ns": took}
