"""OpenTelemetry traces. Prefect makes a span of every flow run and every step by itself, for whoever collects them.

So all that is done here is to send them where OTEL_EXPORTER_OTLP_ENDPOINT says, and to add what foldin knows. Where
the environment says nothing, nothing is imported.
"""

from functools import cache

from flows.about import facts
from flows.environment import wants_traces
from flows.telling import say


@cache
def start() -> bool:
    """Whether this process traces; asked first when flows are imported, before one of them runs."""
    if not wants_traces():
        return False
    from opentelemetry import trace

    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return True  # somebody else saw to it, such as opentelemetry-instrument
    try:
        from flows.spans import provider
    except ImportError as error:
        say(f"no traces are sent: {error}; install foldin[otel]")
        return False
    trace.set_tracer_provider(provider())
    return True


def tag(name: str, **more: str | int) -> None:
    """Give the span that is open a name without a run's number, and what the work is about."""
    if start():
        from opentelemetry import trace

        span = trace.get_current_span()
        span.update_name(name)
        span.set_attributes({f"foldin.{key}": value for key, value in {**facts(), **more}.items()})
