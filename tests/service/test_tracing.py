"""Traces: a collector that is away does not hold up the stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from cellserve.service.observability.tracing import Tracing


class Unanswered(SpanExporter):
    """An exporter whose collector takes what it is sent and never answers."""

    def __init__(self) -> None:
        self.asked, self.over = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        self.over.wait(60)
        return SpanExportResult.FAILURE


def test_a_collector_that_does_not_answer_holds_up_a_stop_for_half_a_second_at_most() -> None:
    exporter = Unanswered()
    tracing = Tracing(exporter)
    with tracing._tracer.start_as_current_span("span"):
        pass
    start = time.monotonic()
    tracing.close()
    assert time.monotonic() - start < 5  # half a second, on a machine that is not busy
    assert exporter.asked.is_set()
    exporter.over.set()
