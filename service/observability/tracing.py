"""OpenTelemetry traces: a span per request or frame, with child spans for each wait, run and store write of its ticks.

OpenTelemetry's own environment variables `OTEL_...` set the exporter's endpoint and the sampling.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cellserve.service.engine.work import WorkItem
from cellserve.service.observability.request_context import get_context, route

log = logging.getLogger("cellserve")

_CLOSE_SECONDS = 0.4  # a stop waits no longer for the collector

_propagator = TraceContextTextMapPropagator()


class Tracing:
    """The spans of one process.

    Args:
        exporter: Receives the spans; by default OTLP over HTTP.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        resource = Resource({SERVICE_NAME: "cellserve"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # `close` does
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("cellserve")

    def close(self) -> None:
        """Sends the remaining spans, and gives up on them if the collector takes longer than `_CLOSE_SECONDS`."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            log.warning("the collector of traces does not answer: the last spans are lost")

    @contextmanager
    def request(self, scope: Any, request_context: Any) -> Iterator[None]:
        """Records the span of an HTTP request, a child of its `traceparent` (W3C Trace Context)."""
        path = route(scope["path"])
        with self._span(f"{scope['method']} {path}", scope) as span:
            span.set_attributes({"http.request.method": scope["method"], "http.route": path})
            try:
                yield
            finally:
                span.set_attribute("http.response.status_code", request_context.status)
                if request_context.status >= 500:
                    span.set_status(StatusCode.ERROR)

    @contextmanager
    def frame(self, scope: Any) -> Iterator[None]:
        """Records the span of a WebSocket frame, a child of the handshake's `traceparent`."""
        with self._span("WS /stream frame", scope):
            yield

    def current(self) -> Any:
        """Returns the current span's context, the parent of spans that other threads or callbacks start later."""
        return context.get_current()

    def record_run(self, items: Sequence[WorkItem], start: float, seconds: float) -> None:
        """Records the spans of a tick's run and of the wait for it, as children of each request in the tick.

        Args:
            items: The items of the tick.
            start: When the run began, in seconds of `time.perf_counter`.
            seconds: The run's duration in seconds.
        """
        for item in _one_a_request(items):
            self._stage("queue", item, items, item.enqueued_at, start)
            self._stage("run", item, items, start, start + seconds)

    def record_commit(self, items: Sequence[WorkItem], start: float, seconds: float) -> None:
        """Records the spans of the store write after a tick; the arguments are those of `ran`."""
        for item in _one_a_request(items):
            self._stage("store", item, items, start, start + seconds)

    def _stage(self, name: str, item: WorkItem, among: Sequence[WorkItem], start: float, end: float) -> None:
        to_wall = time.time_ns() - time.perf_counter_ns()
        span = self._tracer.start_span(name, item.trace, start_time=to_wall + int(1e9 * start))
        span.set_attribute("cellserve.tick.advances", len(among))
        span.end(to_wall + int(1e9 * end))

    @contextmanager
    def _span(self, name: str, scope: Any) -> Iterator[Span]:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent = _propagator.extract(headers)
        with self._tracer.start_as_current_span(name, parent, SpanKind.SERVER) as span:
            span.set_attribute("cellserve.request_id", get_context(scope).id)
            yield span


def _one_a_request(items: Sequence[WorkItem]) -> list[WorkItem]:
    """Returns the first item of each request."""
    return list({id(item.trace): item for item in reversed(items)}.values())
