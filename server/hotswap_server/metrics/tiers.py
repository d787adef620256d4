"""Gauges of the memory that adapters are in, read from the manager whenever they are scraped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hotswap_server.adapters.residency import HostStats, Residency, ResidentAdapter, SlotStats
from hotswap_server.metrics.labels import OTHER

MAX_SHOWN: Final = 256
"""Adapters of each tier with a series of their own; the rest share one, which counts them."""

_TIERS: Final = (Residency.HOST, Residency.DEVICE)


class TierCollector(Collector):
    """`slots` by method, the host cache, and what lies in both. A series ends with what it tells of."""

    def __init__(
        self,
        slots: Callable[[], Mapping[str, SlotStats]],
        host: Callable[[], HostStats],
        residents: Callable[[], Iterable[ResidentAdapter]],
    ) -> None:
        self._slots = slots
        self._host = host
        self._residents = residents

    def collect(self) -> Iterable[Metric]:
        slots = self._slots()
        yield from _slot_metrics(slots)
        yield from _host_metrics(self._host())
        yield from _resident_metrics(list(self._residents()), tuple(slots))


def _slot_metrics(slots: Mapping[str, SlotStats]) -> Iterable[Metric]:
    taken, total, pinned, underway, bank = families = tuple(
        GaugeMetricFamily(f"hotswap_{name}", text, labels=["method"])
        for name, text in (
            ("adapter_slots_used", "Device slots that hold an adapter."),
            ("adapter_slots", "Device slots for adapters."),
            ("adapters_pinned", "Adapters that are pinned to a slot."),
            ("adapters_underway", "Adapters that are being read or wait for a slot."),
            ("adapter_bank_bytes", "Device memory that the slots can come to take."),
        )
    )
    swaps = CounterMetricFamily(
        "hotswap_adapter_swaps", "Adapters that left their slot for another one.", labels=["method"]
    )
    for method, stats in slots.items():
        taken.add_metric([method], stats.taken)
        total.add_metric([method], stats.total)
        pinned.add_metric([method], stats.pinned)
        underway.add_metric([method], stats.underway)
        bank.add_metric([method], stats.bank_bytes)
        swaps.add_metric([method], stats.swaps)
    return *families, swaps


def _host_metrics(host: HostStats) -> Iterable[Metric]:
    return (
        GaugeMetricFamily("hotswap_host_cache_bytes", "Adapters in the host cache.", host.bytes),
        GaugeMetricFamily("hotswap_host_cache_budget_bytes", "What it may hold.", host.budget_bytes),
        GaugeMetricFamily("hotswap_host_cache_adapters", "How many it holds.", host.adapters),
        CounterMetricFamily("hotswap_host_cache_hits", "Loads that found the adapter there.", host.hits),
        CounterMetricFamily("hotswap_host_cache_misses", "Loads that went to the store.", host.misses),
    )


def _resident_metrics(residents: list[ResidentAdapter], methods: tuple[str, ...]) -> Iterable[Metric]:
    counts, sizes = (
        GaugeMetricFamily(f"hotswap_{name}", text, labels=["method", "tier"])
        for name, text in (
            ("adapters_resident", "Adapters in a tier of memory."),
            ("adapter_bytes", "Their size."),
        )
    )
    each = GaugeMetricFamily(
        "hotswap_adapter_resident",
        "1 for an adapter in a tier of memory.",
        labels=["adapter", "version", "method", "tier"],
    )
    numbers, nbytes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for tier in _TIERS:
        here = sorted((r for r in residents if r.tier is tier), key=lambda r: (r.ref.name, r.ref.version))
        for resident in here:
            numbers[resident.ref.method, tier] += 1
            nbytes[resident.ref.method, tier] += resident.nbytes
        for resident in here[:MAX_SHOWN]:
            ref = resident.ref
            each.add_metric([ref.name, str(ref.version), ref.method, tier.value], 1)
        if rest := here[MAX_SHOWN:]:
            each.add_metric([OTHER, "", "", tier.value], len(rest))
        for method in methods:
            counts.add_metric([method, tier.value], numbers[method, tier])
            sizes.add_metric([method, tier.value], nbytes[method, tier])
    return counts, sizes, each
