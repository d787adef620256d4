"""Gauges of the memory that adapters are in, read from the manager whenever they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hotswap_server.adapters.residency import HostStats, SlotStats


class TierCollector(Collector):
    """`slots` by method, and the host cache."""

    def __init__(self, slots: Callable[[], Mapping[str, SlotStats]], host: Callable[[], HostStats]) -> None:
        self._slots = slots
        self._host = host

    def collect(self) -> Iterable[Metric]:
        taken, total, pinned, underway = (
            GaugeMetricFamily(f"hotswap_{name}", text, labels=["method"])
            for name, text in (
                ("adapter_slots_used", "Device slots that hold an adapter."),
                ("adapter_slots", "Device slots for adapters."),
                ("adapters_pinned", "Adapters that are pinned to a slot."),
                ("adapters_underway", "Adapters that are being read or wait for a slot."),
            )
        )
        for method, stats in self._slots().items():
            taken.add_metric([method], stats.taken)
            total.add_metric([method], stats.total)
            pinned.add_metric([method], stats.pinned)
            underway.add_metric([method], stats.underway)
        host = self._host()
        return (
            *(taken, total, pinned, underway),
            GaugeMetricFamily("hotswap_host_cache_bytes", "Adapters in the host cache.", host.bytes),
            GaugeMetricFamily("hotswap_host_cache_budget_bytes", "What it may hold.", host.budget_bytes),
            GaugeMetricFamily("hotswap_host_cache_adapters", "How many it holds.", host.adapters),
            CounterMetricFamily("hotswap_host_cache_hits", "Loads that found the adapter there.", host.hits),
            CounterMetricFamily("hotswap_host_cache_misses", "Loads that went to the store.", host.misses),
        )
