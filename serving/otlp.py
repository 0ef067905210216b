"""Spans by OpenTelemetry's SDK, sent by OTLP over HTTP; loaded only where its variables name a collector.

The variables of its specification hold, read by the SDK itself: endpoint, headers, time limits, sampler, sizes of batches, service name,
resource attributes. A request never waits for the collector: what ends is queued for a thread, and dropped where the queue is full.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from multidict import CIMultiDict
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace import Tracer as OtelTracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.openapi import BODIES
from serving.tracing import NO_SPAN, QUIET_PATHS, Span, Tracer, Value

SERVICE_NAME = "slipway"
FLUSH_S = 2.0  # of a process that ends; a collector that is down costs no more than this
MAX_PATH_CHARS = 200
CONTEXT = TraceContextTextMapPropagator()


class OtlpSpan(Span):
    """A span of the SDK."""

    def __init__(self, tracer: OtelTracer, span: OtelSpan) -> None:
        self._tracer = tracer
        self._span = span
        self.is_recorded = span.is_recording()
        self.trace_id = format_trace_id(span.get_span_context().trace_id)

    def child(self, name: str, attributes: Mapping[str, Value], is_call: bool = False) -> Span:
        """A part of this part, begun now."""
        kind = SpanKind.CLIENT if is_call else SpanKind.INTERNAL
        return OtlpSpan(self._tracer, self._tracer.start_span(name, set_span_in_context(self._span), kind, attributes))

    def past(self, name: str, begun_s: float, ended_s: float) -> None:
        """Tells of a part that is over; seconds on the clock of `time.perf_counter`."""
        if not self.is_recorded:
            return
        epoch_ns = time.time_ns() - time.perf_counter_ns()
        begun_ns, ended_ns = (epoch_ns + int(moment_s * 1e9) for moment_s in (begun_s, ended_s))
        self._tracer.start_span(name, set_span_in_context(self._span), start_time=begun_ns).end(ended_ns)

    def rename(self, name: str) -> None:
        """Gives it a name that was not known when it began."""
        self._span.update_name(name)

    def note(self, attributes: Mapping[str, Value]) -> None:
        """Tells something of it."""
        self._span.set_attributes(attributes)

    def fail(self, kind: str) -> None:
        """Tells that it failed."""
        self._span.set_attribute("error.type", kind)
        self._span.set_status(StatusCode.ERROR)

    def onward(self, headers: CIMultiDict[str]) -> CIMultiDict[str]:
        """The headers by which another server continues the trace."""
        headers = headers.copy()
        CONTEXT.inject(headers, set_span_in_context(self._span))
        return headers

    def end(self) -> None:
        """It is over."""
        self._span.end()


class OtlpTracer(Tracer):
    """Begins spans, and has them sent by a thread."""

    def __init__(self, instance: str) -> None:
        ours = Resource.create({"service.name": SERVICE_NAME, "service.instance.id": instance})
        resource = ours.merge(OTELResourceDetector().detect())  # what the variables say comes last, and so stands
        logging.getLogger(OTLPSpanExporter.__module__).setLevel(logging.ERROR)  # it warns of every try; that a batch is lost is enough
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter()
        self._processor = BatchSpanProcessor(self._exporter)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("slipway.serving")

    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Span:
        """The span of a request that has arrived, in its client's trace where the headers name one."""
        if path in QUIET_PATHS:
            return NO_SPAN
        attributes = {"http.request.method": method, "url.path": path[:MAX_PATH_CHARS]}
        name = method
        if path in BODIES:  # other paths are the client's own text, too many to be names
            attributes["http.route"] = path
            name = f"{method} {path}"
        return OtlpSpan(self._tracer, self._tracer.start_span(name, CONTEXT.extract(headers), SpanKind.SERVER, attributes))

    def flush(self) -> None:
        """Sends what has ended, for at most `FLUSH_S`."""
        _for_a_while(self._processor.force_flush)

    def stop(self) -> None:
        """Sends what has ended, for at most `FLUSH_S`, and nothing after."""
        if not _for_a_while(self._provider.shutdown):
            self._exporter.shutdown()  # type: ignore[no-untyped-call]  # ends its waiting for the next try


def _for_a_while(work: Callable[[], object]) -> bool:
    """Does it, and says whether it is done; after `FLUSH_S` it goes on without us: the SDK's own limit is half a minute."""
    thread = threading.Thread(target=work, name="traces-end", daemon=True)
    thread.start()
    thread.join(FLUSH_S)
    return not thread.is_alive()
