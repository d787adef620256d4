"""The caller's trace, for the server to go on with."""

from __future__ import annotations

import sys


def trace_context() -> tuple[tuple[str, str], ...]:
    """Metadata that names the active OpenTelemetry span (https://www.w3.org/TR/trace-context/), if any is."""
    if "opentelemetry.trace" not in sys.modules:  # nobody can have begun a span
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())
