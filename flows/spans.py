"""Spans on their way to a collector. Imported only where the environment says where traces go; needs foldin[otel]."""

from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Status

from flows.hiding import hidden


def provider() -> TracerProvider:
    """What collects the spans of this process and sends them where OTEL_EXPORTER_OTLP_ENDPOINT says."""
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "foldin"}))
    made = TracerProvider(resource=resource)
    made.add_span_processor(BatchSpanProcessor(Concealing(OTLPSpanExporter())))
    return made


class Concealing(SpanExporter):
    """Hands spans on without secrets: Prefect notes errors with their traceback, which may quote an address."""

    def __init__(self, to: SpanExporter) -> None:
        self._to = to

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send them."""
        return self._to.export([concealed(each) for each in spans])

    def shutdown(self) -> None:
        """Send nothing more."""
        self._to.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what waits."""
        return self._to.force_flush(timeout_millis)


def concealed(span: ReadableSpan) -> ReadableSpan:
    """The same span without secrets."""
    return ReadableSpan(
        span.name,
        span.context,
        span.parent,
        span.resource,
        span.attributes,
        [_concealed(event) for event in span.events],
        span.links,
        span.kind,
        status=Status(span.status.status_code, hidden(span.status.description or "") or None),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _concealed(event: Event) -> Event:
    told = {key: hidden(value) if isinstance(value, str) else value for key, value in (event.attributes or {}).items()}
    return Event(event.name, told, event.timestamp)
