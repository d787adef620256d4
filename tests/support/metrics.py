"""A server's metrics after everything that they tell of has happened once."""

from types import SimpleNamespace

from hotswap_server.adapters.residency import (
    HostStats,
    LoadRecord,
    Residency,
    ResidentAdapter,
    SlotStats,
)
from hotswap_server.core import AdapterRef, FinishReason, ServingPath, Timings
from hotswap_server.engine.calibration import Calibration, MethodCost
from hotswap_server.engine.observer import RequestRecord, StepRecord
from hotswap_server.errors import StoreUnavailableError
from hotswap_server.metrics import Metrics

REF = AdapterRef("acme/support", 1, "d", "lora")


def exercised() -> Metrics:
    """Every family has a series with all its labels."""
    metrics = Metrics(tenants=True)
    metrics.describe_build(version="1", torch="2", device="cpu", base="smollm2")
    load = SimpleNamespace(
        running=1,
        waiting=2,
        kv_pages_used=3,
        kv_pages_total=4,
        kv_pages_prefixes=1,
        preemptions=0,
        sound=True,
        steps_failed=0,
        steps_stuck=0,
        adapters_quarantined=0,
    )
    metrics.watch_engine(lambda: load)
    metrics.watch_adapters(
        lambda: {"lora": SlotStats(1, 16, 0, 0)},
        lambda: HostStats(10, 20, 1, 3, 4),
        lambda: [ResidentAdapter(REF, tier, 10) for tier in (Residency.HOST, Residency.DEVICE)],
    )
    metrics.watch_tenants(lambda: {"acme": (1, 2)})
    metrics.call_started("Generate")
    metrics.call_ended("Generate", "lora", "OK", 0.5)
    metrics.step(StepRecord(0.25, 5, 4, 4, 2, 4, 0, 1, 10))
    metrics.finished(
        RequestRecord(
            method="lora",
            path=ServingPath.BATCHED,
            finish_reason=FinishReason.LENGTH,
            error=None,
            num_prompt_tokens=10,
            num_generated_tokens=3,
            timings=Timings(1.0, 2.0, 3.0, 4.0),
            ttft=0.5,
            inter_token=(0.1, 0.3),
            adapter=REF,
        )
    )
    metrics.loaded(LoadRecord(REF, 0.5, 0.1))
    metrics.evicted(REF, Residency.DEVICE)
    metrics.retried(REF, StoreUnavailableError("away"))
    metrics.failed(REF, StoreUnavailableError("away"))
    metrics.merged(REF, 0.1)
    metrics.unmerged(REF)
    cost = MethodCost("lora", ServingPath.BATCHED, 8, 1.25, 0.01, 8, False)
    metrics.calibrated(Calibration((cost,), 0.5))
    return metrics


def labels_by_name(metrics: Metrics) -> dict[str, tuple[str, frozenset[str]]]:
    """Type and label names of each metric, by its full name."""
    found = {}
    for family in metrics.registry.collect():
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, frozenset(labels))
    return found
