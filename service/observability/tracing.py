"""Traces (OpenTelemetry): a span a request or frame, and below it one for each wait, run and write of its ticks.

Where they go, and how many of them, is told by OpenTelemetry's own variables `OTEL_...`. The package is an extra.
"""

from __future__ import annotations

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

from cellserve.service.engine.scheduler import Advance
from cellserve.service.observability.request_context import get_context, route

_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Makes the spans of one process.

    Args:
        exporter: Takes them; over OTLP and HTTP where it is left out.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        resource = Resource({SERVICE_NAME: "cellserve"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("cellserve")

    def close(self) -> None:
        """Sends what has not been sent; blocks for seconds where nobody takes it."""
        self._provider.shutdown()

    @contextmanager
    def request(self, scope: Any, asked: Any) -> Iterator[None]:
        """Makes the span of a request over HTTP, below that of its `traceparent` (W3C Trace Context)."""
        path = route(scope["path"])
        with self._span(f"{scope['method']} {path}", scope) as span:
            span.set_attributes({"http.request.method": scope["method"], "http.route": path})
            try:
                yield
            finally:
                span.set_attribute("http.response.status_code", asked.status)
                if asked.status >= 500:
                    span.set_status(StatusCode.ERROR)

    @contextmanager
    def frame(self, scope: Any) -> Iterator[None]:
        """Makes the span of a WebSocket's frame, below that of the handshake's `traceparent`."""
        with self._span("WS /stream frame", scope):
            yield

    def here(self) -> Any:
        """Gives what spans of other threads and turns are to be put below."""
        return context.get_current()

    def ran(self, advances: Sequence[Advance], start: float, took: float) -> None:
        """Makes the spans of a tick's run, and of the wait for it, below each request that took part.

        Args:
            advances: That took part.
            start: Seconds of `time.perf_counter`.
            took: Seconds.
        """
        for advance in _one_a_request(advances):
            self._stage("queue", advance, advances, advance.arrived, start)
            self._stage("run", advance, advances, start, start + took)

    def stored(self, advances: Sequence[Advance], start: float, took: float) -> None:
        """Makes the spans of the write of what a tick has come to, as `ran` does."""
        for advance in _one_a_request(advances):
            self._stage("store", advance, advances, start, start + took)

    def _stage(self, name: str, advance: Advance, among: Sequence[Advance], start: float, end: float) -> None:
        to_wall = time.time_ns() - time.perf_counter_ns()
        span = self._tracer.start_span(name, advance.trace, start_time=to_wall + int(1e9 * start))
        span.set_attribute("cellserve.tick.advances", len(among))
        span.end(to_wall + int(1e9 * end))

    @contextmanager
    def _span(self, name: str, scope: Any) -> Iterator[Span]:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent = _propagator.extract(headers)
        with self._tracer.start_as_current_span(name, parent, SpanKind.SERVER) as span:
            span.set_attribute("cellserve.request_id", get_context(scope).id)
            yield span


def _one_a_request(advances: Sequence[Advance]) -> list[Advance]:
    """Gives of each request the advance that came first."""
    return list({id(advance.trace): advance for advance in reversed(advances)}.values())
