"""What requests took in the engine, by method and path, and how many each adapter and tenant had."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import Counter, Histogram

from hotswap_server.engine.observer import RequestRecord
from hotswap_server.errors import RequestCancelledError
from hotswap_server.metrics.families import STEP_BUCKETS, Families
from hotswap_server.metrics.gaps import BulkHistogram
from hotswap_server.metrics.labels import (
    FINISH_REASONS,
    SCORED,
    FirstNames,
    error_reason,
    exemplar,
    method_label,
    methods_and_paths,
)

_LABELS = ("method", "path")


@dataclass(frozen=True, slots=True)
class _Children:
    """The series of one method and path: looking them up for every request would take half of the time."""

    prompt_tokens: Counter
    generated_tokens: Counter
    ttft: Histogram
    end_to_end: Histogram
    queue: Histogram
    load: Histogram
    prefill: Histogram
    decode: Histogram


class RequestMetrics:
    """Called on the engine's thread."""

    def __init__(self, make: Families, methods: Iterable[str], *, tenants: bool) -> None:
        self._finished = make.counter(
            "engine_requests", "Requests that left the engine.", *_LABELS, "finish_reason"
        )
        self._prompt_tokens = make.counter("prompt_tokens", "Tokens read.", *_LABELS)
        self._generated_tokens = make.counter("generated_tokens", "Tokens generated.", *_LABELS)

        def seconds(name: str, text: str) -> Histogram:
            return make.histogram(f"{name}_seconds", text, *_LABELS)

        self._ttft = seconds("time_to_first_token", "Time from arrival in the engine to the first new token.")
        self._end_to_end = seconds("end_to_end", "Time of a request in the server, its load included.")
        self._queue = seconds("queue", "Time a request waited for a place in the batch.")
        self._load = seconds("load", "Time a request waited for its adapter.")
        self._prefill = seconds("prefill", "Time a request spent in prefill.")
        self._decode = seconds("decode", "Time a request spent in decoding.")
        self._inter_token = BulkHistogram(
            "hotswap_inter_token_seconds", "Time between two new tokens of a request.", _LABELS, STEP_BUCKETS
        )
        make.registry.register(self._inter_token)
        self._adapter_names = FirstNames()
        self._by_adapter = make.counter(
            "adapter_requests", "Requests that left the engine.", "adapter", "method", "outcome"
        )
        self._tenant_names = FirstNames()
        self._by_tenant: Counter | None = None
        self._tenant_tokens: Counter | None = None
        if tenants:
            self._by_tenant = make.counter(
                "tenant_requests", "Requests that left the engine.", "tenant", "outcome"
            )
            self._tenant_tokens = make.counter(
                "tenant_tokens", "Tokens read and generated.", "tenant", "kind"
            )
        self._children: dict[tuple[str, str], _Children] = {}
        for labels in methods_and_paths(methods):
            self._of(labels)
            for reason in FINISH_REASONS:
                self._finished.labels(*labels, reason)

    def finished(self, record: RequestRecord) -> None:
        labels = method_label(record.method), record.path.value
        if record.error is not None:
            reason = error_reason(record.error).lower()
        else:
            reason = record.finish_reason.value if record.finish_reason is not None else SCORED
        self._finished.labels(*labels, reason).inc()
        self._count_names(record)
        children = self._of(labels)
        children.generated_tokens.inc(record.num_generated_tokens)
        if record.error is not None:  # its prompt may not have been read, and its times say little
            return
        children.prompt_tokens.inc(record.num_prompt_tokens)
        timings, trace = record.timings, exemplar(record.trace)
        children.queue.observe(timings.queue, trace)
        children.load.observe(timings.load, trace)
        children.prefill.observe(timings.prefill, trace)
        children.decode.observe(timings.decode, trace)
        children.end_to_end.observe(timings.queue + timings.load + timings.prefill + timings.decode, trace)
        if record.ttft is not None:
            children.ttft.observe(record.ttft, trace)
        self._inter_token.observe(labels, record.inter_token, trace)

    def _count_names(self, record: RequestRecord) -> None:
        if record.adapter is None:
            return
        outcome = "ok" if record.error is None else "error"
        if isinstance(record.error, RequestCancelledError):
            outcome = "cancelled"
        name, method = record.adapter.name, record.adapter.method
        self._by_adapter.labels(self._adapter_names.label(name), method, outcome).inc()
        if self._by_tenant is None or self._tenant_tokens is None:
            return
        tenant = self._tenant_names.label(name.partition("/")[0])
        self._by_tenant.labels(tenant, outcome).inc()
        self._tenant_tokens.labels(tenant, "generated").inc(record.num_generated_tokens)
        if record.error is None:
            self._tenant_tokens.labels(tenant, "prompt").inc(record.num_prompt_tokens)

    def _of(self, labels: tuple[str, str]) -> _Children:
        if labels not in self._children:
            self._inter_token.touch(*labels)
            self._children[labels] = _Children(
                prompt_tokens=self._prompt_tokens.labels(*labels),
                generated_tokens=self._generated_tokens.labels(*labels),
                ttft=self._ttft.labels(*labels),
                end_to_end=self._end_to_end.labels(*labels),
                queue=self._queue.labels(*labels),
                load=self._load.labels(*labels),
                prefill=self._prefill.labels(*labels),
                decode=self._decode.labels(*labels),
            )
        return self._children[labels]
