"""OpenTelemetry traces, where OTEL_EXPORTER_OTLP_ENDPOINT says where to; nothing otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def find_tracer(exporter: Any = None) -> Any:
    """A tracer that sends to `exporter`, or to the endpoint of the environment; None without either.

    OpenTelemetry's other variables (headers, protocol options, resource attributes) are heeded as usual.
    """
    if exporter is None and not os.environ.get(ENDPOINT):
        return None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if exporter is None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter()
    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "rayrm")}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider.get_tracer("rayrm")


def start_span(tracer: Any, headers: Mapping[bytes, bytes], request_id: str) -> Any:
    """A span for a request, below that of the client which its headers name; None without a tracer."""
    if tracer is None:
        return None
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
    span = tracer.start_span("request", extract(carrier), SpanKind.SERVER)
    span.set_attribute("rayrm.request_id", request_id)
    return span


def end_span(span: Any, path: str, code: int, facts: Mapping[str, Any]) -> None:
    """End a request's span with what became of it."""
    if span is None:
        return
    span.update_name(path)
    span.set_attribute("http.route", path)
    span.set_attribute("http.response.status_code", code)
    for name, value in facts.items():
        span.set_attribute(f"rayrm.{name}", value)
    span.end()
