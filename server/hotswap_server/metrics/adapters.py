"""Adapters that come, go, fail, and are merged."""

from __future__ import annotations

from collections.abc import Iterable

from hotswap_server.adapters.residency import LoadRecord, Residency
from hotswap_server.core import AdapterRef
from hotswap_server.metrics.families import Families
from hotswap_server.metrics.labels import error_reason


class AdapterMetrics:
    """An AdapterObserver and a MergeObserver; called on any thread."""

    def __init__(self, make: Families, methods: Iterable[str]) -> None:
        self._loads = make.counter("adapter_loads", "Adapters that came to the device.", "method")
        self._load_seconds = make.histogram(
            "adapter_load_seconds", "Time to bring an adapter to the device.", "method"
        )
        self._slot_waits = make.histogram(
            "adapter_slot_wait_seconds",
            "Time of that in which the adapter waited in host memory for a slot.",
            "method",
        )
        self._evictions = make.counter(
            "adapter_evictions", "Adapters that left host memory or the device.", "method", "tier"
        )
        self._retries = make.counter(
            "adapter_load_retries", "Reads of the store that failed and were tried again.", "method", "reason"
        )
        self._failures = make.counter("adapter_load_failures", "Loads that failed.", "method", "reason")
        self._merge_seconds = make.histogram(
            "adapter_merge_seconds", "Time to merge an adapter into the base."
        )
        self._merges = make.counter("adapter_merges", "Adapters that were merged into the base.")
        self._unmerges = make.counter("adapter_unmerges", "Adapters that were taken out of it.")
        self._merged = make.gauge("adapters_merged", "Adapters that are in the base's weights.")
        for method in methods:
            self._loads.labels(method)
            self._load_seconds.labels(method)
            self._slot_waits.labels(method)
            for tier in (Residency.HOST, Residency.DEVICE):
                self._evictions.labels(method, tier.value)
            for reason in ("store_unavailable", "store_denied"):
                self._retries.labels(method, reason)
                self._failures.labels(method, reason)
            for reason in ("adapter_invalid", "adapter_damaged", "adapter_not_found", "capacity_exceeded"):
                self._failures.labels(method, reason)

    def loaded(self, record: LoadRecord) -> None:
        method = record.ref.method
        self._loads.labels(method).inc()
        self._load_seconds.labels(method).observe(record.seconds)
        self._slot_waits.labels(method).observe(record.slot_seconds)

    def retried(self, ref: AdapterRef, error: Exception) -> None:
        self._retries.labels(ref.method, error_reason(error).lower()).inc()

    def evicted(self, ref: AdapterRef, tier: Residency) -> None:
        self._evictions.labels(ref.method, tier.value).inc()

    def failed(self, ref: AdapterRef, error: Exception) -> None:
        self._failures.labels(ref.method, error_reason(error).lower()).inc()

    def merged(self, ref: AdapterRef, seconds: float) -> None:
        self._merges.inc()
        self._merged.inc()
        self._merge_seconds.observe(seconds)

    def unmerged(self, ref: AdapterRef) -> None:
        self._unmerges.inc()
        self._merged.dec()
