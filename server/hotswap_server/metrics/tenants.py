"""Gauges of what each tenant has in the engine, read when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hotswap_server.metrics.labels import MAX_NAMES, OTHER


class TenantCollector(Collector):
    """Running and waiting requests by tenant, of the busiest ones; the rest share OTHER."""

    def __init__(self, load: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        self._load = load

    def collect(self) -> Iterable[Metric]:
        names = ("hotswap_tenant_requests_running", "hotswap_tenant_requests_waiting")
        texts = ("Requests of a tenant in the batch.", "Requests of a tenant that wait.")
        families = [GaugeMetricFamily(*pair, labels=["tenant"]) for pair in zip(names, texts, strict=True)]
        load = sorted(self._load().items(), key=lambda item: (-sum(item[1]), item[0]))
        rest = [counts for _, counts in load[MAX_NAMES:]]
        shown = load[:MAX_NAMES]
        if rest:
            shown.append((OTHER, (sum(running for running, _ in rest), sum(waiting for _, waiting in rest))))
        for tenant, counts in shown:
            for family, count in zip(families, counts, strict=True):
                family.add_metric([tenant], count)
        return families
