"""Spans of calls and their stages, for an OpenTelemetry collector; nothing where no collector is named.

Nothing of opentelemetry is imported before `open_tracing`, which the extra `hotswap[otel]` brings.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import structlog

from hotswap_server.core import Trace
from hotswap_server.engine.observer import RequestRecord, StepRecord
from hotswap_server.metrics.labels import UNKNOWN, error_reason

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SETTING: Final = "otlp_endpoint"
_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_CONTEXT_KEYS: Final = frozenset({"traceparent", "tracestate"})
# What a call's span says of the facts that its line in the log has; the rest is the operator's alone.
_FACTS: Final = (
    *("adapter", "alias", "version", "path", "finish_reason", "prompt_tokens", "generated_tokens"),
)
_OK: Final = "OK"

logger = structlog.stdlib.get_logger(__name__)


class TracingSettingsError(ValueError):
    """Tracing is asked for and cannot be done. `name` is the flag or variable to change."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def check_tracing(setting: str | None) -> str | None:
    """The collector that the setting `otlp_endpoint`, else OpenTelemetry's variables name; None for off.

    Raises:
        TracingSettingsError: it cannot be used, or the extra is missing.
    """
    name, endpoint = "--otlp-endpoint", setting
    if endpoint is None:
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return None
        name = next((variable for variable in _VARIABLES if os.environ.get(variable)), "")
        if not name:
            return None
        endpoint = os.environ[name]
        for variable in _PROTOCOLS:
            if (protocol := os.environ.get(variable)) and protocol != "grpc":
                raise TracingSettingsError(
                    variable,
                    f"spans are sent by grpc alone, got {protocol!r}; name a grpc port, or unset both",
                )
    if not _is_url(endpoint):
        raise TracingSettingsError(
            name,
            f"must be http://HOST:PORT, or https:// for TLS, got {endpoint!r}; collectors listen on 4317",
        )
    try:
        import opentelemetry.exporter.otlp.proto.grpc.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise TracingSettingsError(
            name, f"tracing needs the extra otel ({error}); pip install 'hotswap[otel]', or unset it"
        ) from error
    return endpoint


def open_tracing(endpoint: str, *, version: str) -> Tracing:
    """Send spans to `endpoint`, which `check_tracing` gave; it need not be reachable.

    Batches, headers, certificates, sampler and resource follow OpenTelemetry's standard variables.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = Resource({"service.name": "hotswap", "service.version": version})
    resource = Resource.create(dict(ours.merge(OTELResourceDetector().detect()).attributes))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    parts = urlsplit(endpoint)
    logger.info("tracing", collector=parts.netloc.rpartition("@")[2], tls=parts.scheme == "https")
    return Tracing(provider)


class CallSpan:
    """The span of one call, from its arrival until `end`. `trace` is None for one that is not sampled."""

    def __init__(self, span: Span, trace: Trace | None) -> None:
        self._span = span
        self.trace = trace

    def end(self, code: str, *, method: str, digest: str, facts: Mapping[str, object]) -> None:
        """`code` is the gRPC status's name, `facts` the call's."""
        if self.trace is None:
            return
        from opentelemetry.trace import Status, StatusCode

        span = self._span
        span.set_attribute("rpc.response.status_code", code)
        for name in _FACTS:
            if isinstance(value := facts.get(name), str | int):
                span.set_attribute(f"hotswap.{name}", value)
        if method != UNKNOWN:
            span.set_attribute("hotswap.method", method)
        if digest:
            span.set_attribute("hotswap.digest", digest)
        if code != _OK:
            span.set_attribute("error.type", code)
            span.set_status(Status(StatusCode.ERROR, str(facts.get("error", code))))
        span.end(_wall(self.trace, time.perf_counter()))


class Tracing:
    """Makes spans in `provider` on the event loop that it is made on; `close` it once.

    It is an EngineObserver too: the engine's thread hands a traced request over when it ends, no more.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("hotswap_server")
        self._propagator = TraceContextTextMapPropagator()
        self._loop = asyncio.get_running_loop()

    def start(
        self, rpc: str, metadata: Iterable[tuple[str, str | bytes]], *, request_id: str = ""
    ) -> CallSpan:
        """A span for a call of `rpc`, which is `package.Service/Method`, under the caller's if it has one.

        Its context is that of https://www.w3.org/TR/trace-context/ in the call's metadata.
        """
        from opentelemetry.trace import SpanKind, set_span_in_context

        wall, clock = time.time_ns(), time.perf_counter()
        # Of several the last: an instrumented channel adds its own to what the client gave.
        carrier = {key: value for key, value in metadata if key in _CONTEXT_KEYS and isinstance(value, str)}
        span = self._tracer.start_span(
            rpc,
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": rpc, "hotswap.request_id": request_id},
            start_time=wall,
        )
        if not span.is_recording():
            return CallSpan(span, None)
        id_ = format(span.get_span_context().trace_id, "032x")
        return CallSpan(span, Trace(id_, set_span_in_context(span), wall, clock))

    def step(self, record: StepRecord) -> None:
        """Steps have no spans: a request's would be as many as its tokens."""

    def finished(self, record: RequestRecord) -> None:
        """Called on the engine's thread."""
        if record.trace is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stages, record, record.trace, time.perf_counter())

    def _stages(self, record: RequestRecord, trace: Trace, ended: float) -> None:
        """One span for each stage that took time, end to end; one that recurred has its whole time in one."""
        from opentelemetry.trace import Status, StatusCode

        spent = record.timings
        tokens = {
            "prefill": {"hotswap.prompt_tokens": record.num_prompt_tokens},
            "decode": {"hotswap.generated_tokens": record.num_generated_tokens},
        }
        stages = {
            name: seconds
            for name in ("queue", "load", "prefill", "decode")
            if (seconds := getattr(spent, name)) > 0
        }
        last = next(reversed(stages), None)
        began = ended - sum(stages.values())
        for name, seconds in stages.items():
            span = self._tracer.start_span(
                name, trace.parent, attributes=tokens.get(name), start_time=_wall(trace, began)
            )
            began += seconds
            if record.error is not None and name == last:
                span.set_status(Status(StatusCode.ERROR, error_reason(record.error)))
            span.end(_wall(trace, began))

    async def close(self, timeout: float) -> None:
        """Send what is left; give up after `timeout` seconds."""
        # A thread that does not keep the process: an exporter may go on trying for long.
        closing = threading.Thread(target=self._provider.shutdown, name="hotswap-tracing", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, timeout)
        if closing.is_alive():
            logger.warning("spans_not_sent", waited=timeout)


def _is_url(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no number as port, or half a bracket
        return False


def _wall(trace: Trace, clock: float) -> int:
    """Nanoseconds of the epoch at `clock`, so that spans stay nested when the system's time is set."""
    return trace.started_ns + round((clock - trace.started) * 1e9)
