"""All metrics of one server, and whom they observe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Info, disable_created_metrics

from hotswap_server.adapters.method import available_methods
from hotswap_server.adapters.residency import HostStats, ResidentAdapter, SlotStats
from hotswap_server.metrics.adapters import AdapterMetrics
from hotswap_server.metrics.calls import CallMetrics
from hotswap_server.metrics.families import NAMESPACE, Families
from hotswap_server.metrics.overhead import OverheadCollector
from hotswap_server.metrics.requests import RequestMetrics
from hotswap_server.metrics.steps import EngineCollector, EngineLoad, StepMetrics
from hotswap_server.metrics.tenants import TenantCollector
from hotswap_server.metrics.tiers import TierCollector


class Metrics:
    """An EngineObserver, an AdapterObserver and a MergeObserver with a registry of its own.

    Every label value that is known beforehand has its series at 0 from the start, so that the first event is
    an increase. `tenants` adds series by tenant.
    """

    def __init__(self, *, tenants: bool = False) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # second series that nobody reads
        self.registry = CollectorRegistry()
        make, methods = Families(self.registry), tuple(available_methods())
        calls = CallMetrics(make, methods)
        self.call_started, self.call_ended = calls.started, calls.ended
        self.finished = RequestMetrics(make, methods, tenants=tenants).finished
        self.step = StepMetrics(make).step
        adapters = AdapterMetrics(make, methods)
        self.loaded, self.retried, self.failed = adapters.loaded, adapters.retried, adapters.failed
        self.evicted, self.merged, self.unmerged = adapters.evicted, adapters.merged, adapters.unmerged
        overhead = OverheadCollector()
        self.registry.register(overhead)
        self.calibrated = overhead.calibrated

    def describe_build(self, **facts: str) -> None:
        """Show `facts` as the labels of `hotswap_build_info`."""
        Info("build", "What is running.", namespace=NAMESPACE, registry=self.registry).info(facts)

    def watch_engine(self, load: Callable[[], EngineLoad]) -> None:
        """Read the engine's gauges from `load` whenever they are scraped."""
        self.registry.register(EngineCollector(load))

    def watch_adapters(
        self,
        slots: Callable[[], Mapping[str, SlotStats]],
        host: Callable[[], HostStats],
        residents: Callable[[], Iterable[ResidentAdapter]],
    ) -> None:
        """Read the gauges of slots, by method, of host memory and of adapters whenever they are scraped."""
        self.registry.register(TierCollector(slots, host, residents))

    def watch_tenants(self, load: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        """Read running and waiting requests by tenant from `load` whenever they are scraped."""
        self.registry.register(TenantCollector(load))
