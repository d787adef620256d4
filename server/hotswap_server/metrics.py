"""Prometheus metrics: base units, names under `hotswap_`, and the adapter's method as the label `method`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Thread
from typing import Final, Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    start_http_server,
)

from hotswap_server.adapters.residency import HostStats, LoadRecord, Residency, SlotStats
from hotswap_server.core import BASE_METHOD, AdapterRef
from hotswap_server.engine.observer import RequestRecord, StepRecord
from hotswap_server.errors import HotswapError
from hotswap_server.tenant_metrics import TenantCollector
from hotswap_server.tier_metrics import TierCollector

UNKNOWN: Final = "unknown"
"""Label of a call that ended before its adapter was found."""

# Seconds: from a cached first token to a long generation, and from one GPU step to one slow CPU step.
_REQUEST_BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
_STEP_BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
)
_SIZE_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class EngineLoad(Protocol):
    """What is in the engine at this moment."""

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def kv_pages_used(self) -> int: ...

    @property
    def kv_pages_total(self) -> int: ...


def method_label(method: str) -> str:
    return "base" if method == BASE_METHOD else method


def error_reason(error: BaseException) -> str:
    return error.reason if isinstance(error, HotswapError) else "INTERNAL"


class Metrics:
    """All metrics of one server, in a registry of their own. An EngineObserver and an AdapterObserver."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # second series that nobody reads
        self.registry = CollectorRegistry()
        self._observe_calls()
        self._observe_requests()
        self._observe_engine()
        self._observe_adapters()

    def _observe_calls(self) -> None:
        self._requests = self._counter("requests", "Calls that ended.", "rpc", "method", "code")
        self._request_seconds = self._histogram(
            "request_seconds", "Time from a call's arrival to its end.", _REQUEST_BUCKETS, "rpc", "method"
        )
        self._in_flight = self._gauge("requests_in_flight", "Calls that have not ended.", "rpc")

    def _observe_requests(self) -> None:
        labels = ("method", "path")
        self._finished = self._counter(
            "engine_requests", "Requests that left the engine.", *labels, "finish_reason"
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens read.", *labels)
        self._generated_tokens = self._counter("generated_tokens", "Tokens generated.", *labels)

        def seconds(name: str, text: str) -> Histogram:
            return self._histogram(f"{name}_seconds", text, _REQUEST_BUCKETS, *labels)

        self._ttft = seconds("time_to_first_token", "Time from arrival in the engine to the first new token.")
        self._inter_token = self._histogram(
            "inter_token_seconds", "Time between two new tokens of a request.", _STEP_BUCKETS, *labels
        )
        self._stages = {
            "queue": seconds("queue", "Time a request waited for a place in the batch."),
            "load": seconds("load", "Time a request waited for its adapter."),
            "prefill": seconds("prefill", "Time a request spent in prefill."),
            "decode": seconds("decode", "Time a request spent in decoding."),
        }

    def _observe_engine(self) -> None:
        self._step_seconds = self._histogram(
            "step_seconds", "Wall time of a step that did prefill, decode or both.", _STEP_BUCKETS, "phase"
        )
        self._step_tokens = self._counter("step_tokens", "Tokens that steps computed.", "phase")
        self._batch_size = self._histogram("batch_size", "Requests in a step.", _SIZE_BUCKETS)
        self._batch_adapters = self._histogram("batch_adapters", "Adapters in a step.", (0, *_SIZE_BUCKETS))
        self._running = self._gauge("requests_running", "Requests in the batch.")
        self._waiting = self._gauge("requests_waiting", "Requests that wait for a place or an adapter.")
        self._kv_used = self._gauge("kv_pages_used", "Pages of the key-value cache that are in use.")
        self._kv_total = self._gauge("kv_pages", "Pages of the key-value cache.")

    def _observe_adapters(self) -> None:
        self._loads = self._histogram(
            "adapter_load_seconds", "Time to bring an adapter to the device.", _REQUEST_BUCKETS, "method"
        )
        self._slot_waits = self._histogram(
            "adapter_slot_wait_seconds",
            "Time of that in which the adapter waited in host memory for a slot.",
            _REQUEST_BUCKETS,
            "method",
        )
        self._evictions = self._counter(
            "adapter_evictions", "Adapters that left host memory or the device.", "method", "tier"
        )
        self._load_retries = self._counter(
            "adapter_load_retries", "Reads of the store that failed and were tried again.", "method", "reason"
        )
        self._load_failures = self._counter("adapter_load_failures", "Loads that failed.", "method", "reason")

        self._merge_seconds = self._histogram(
            "adapter_merge_seconds", "Time to merge an adapter into the base.", _REQUEST_BUCKETS
        )
        self._merges = self._counter("adapter_merges", "Adapters that were merged into the base.")
        self._unmerges = self._counter("adapter_unmerges", "Adapters that were taken out of it.")
        self._merged = self._gauge("adapters_merged", "Adapters that are in the base's weights.")

    def describe_build(self, **facts: str) -> None:
        """Show `facts` as the labels of `hotswap_build_info`."""
        Info("build", "What is running.", namespace="hotswap", registry=self.registry).info(facts)

    def watch_engine(self, load: Callable[[], EngineLoad]) -> None:
        """Read the engine's gauges from `load` whenever they are scraped."""
        self._running.set_function(lambda: load().running)
        self._waiting.set_function(lambda: load().waiting)
        self._kv_used.set_function(lambda: load().kv_pages_used)
        self._kv_total.set_function(lambda: load().kv_pages_total)

    def watch_adapters(
        self, slots: Callable[[], Mapping[str, SlotStats]], host: Callable[[], HostStats]
    ) -> None:
        """Read the gauges of slots, by method, and of host memory whenever they are scraped."""
        self.registry.register(TierCollector(slots, host))

    def watch_tenants(self, load: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        """Read running and waiting requests by tenant from `load` whenever they are scraped."""
        self.registry.register(TenantCollector(load))

    def call_started(self, rpc: str) -> None:
        self._in_flight.labels(rpc).inc()

    def call_ended(self, rpc: str, method: str, code: str, seconds: float) -> None:
        """`method` as a label (`base`, `lora`, … or `unknown`), `code` as gRPC spells it."""
        self._in_flight.labels(rpc).dec()
        self._requests.labels(rpc, method, code).inc()
        self._request_seconds.labels(rpc, method).observe(seconds)

    def step(self, record: StepRecord) -> None:
        phases = {"prefill": record.num_prefill_tokens, "decode": record.num_decode_tokens}
        active = [phase for phase, tokens in phases.items() if tokens]
        if not active:
            return
        self._step_seconds.labels(active[0] if len(active) == 1 else "mixed").observe(record.seconds)
        for phase in active:
            self._step_tokens.labels(phase).inc(phases[phase])
        self._batch_size.observe(record.batch_size)
        self._batch_adapters.observe(record.distinct_adapters)

    def finished(self, record: RequestRecord) -> None:
        labels = (method_label(record.method), record.path.value)
        if record.error is not None:
            reason = error_reason(record.error).lower()
        else:
            reason = record.finish_reason.value if record.finish_reason is not None else "scored"
        self._finished.labels(*labels, reason).inc()
        self._generated_tokens.labels(*labels).inc(record.num_generated_tokens)
        if record.error is not None:  # its prompt may not have been read, and its times say little
            return
        self._prompt_tokens.labels(*labels).inc(record.num_prompt_tokens)
        for stage, histogram in self._stages.items():
            histogram.labels(*labels).observe(getattr(record.timings, stage))
        if record.ttft is not None:
            self._ttft.labels(*labels).observe(record.ttft)
        gaps = self._inter_token.labels(*labels)
        for gap in record.inter_token:
            gaps.observe(gap)

    def loaded(self, record: LoadRecord) -> None:
        self._loads.labels(record.ref.method).observe(record.seconds)
        self._slot_waits.labels(record.ref.method).observe(record.slot_seconds)

    def retried(self, ref: AdapterRef, error: Exception) -> None:
        self._load_retries.labels(ref.method, error_reason(error).lower()).inc()

    def evicted(self, ref: AdapterRef, tier: Residency) -> None:
        self._evictions.labels(ref.method, tier.value).inc()

    def failed(self, ref: AdapterRef, error: Exception) -> None:
        self._load_failures.labels(ref.method, error_reason(error).lower()).inc()

    def merged(self, ref: AdapterRef, seconds: float) -> None:
        self._merges.inc()
        self._merged.inc()
        self._merge_seconds.observe(seconds)

    def unmerged(self, ref: AdapterRef) -> None:
        self._unmerges.inc()
        self._merged.dec()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="hotswap", registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace="hotswap", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace="hotswap", registry=self.registry, buckets=buckets)


class MetricsServer:
    """Answers scrapes at `http://host:port/metrics` on a thread of its own, until it is closed."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Raises OSError if the port is taken."""
        server_and_thread: tuple[WSGIServer, Thread] = start_http_server(port, host, metrics.registry)
        self._server, self._thread = server_and_thread
        self.port = int(self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
