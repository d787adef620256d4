"""What records become, and the endpoint that shows it."""

from __future__ import annotations

import socket
import urllib.request
from types import SimpleNamespace

import pytest
from hotswap_server.adapters.residency import (
    HostStats,
    LoadRecord,
    Residency,
    ResidentAdapter,
    SlotStats,
)
from hotswap_server.core import AdapterRef, FinishReason, ServingPath, Timings
from hotswap_server.engine.observer import RequestRecord, StepRecord
from hotswap_server.errors import (
    AdapterInvalidError,
    EngineError,
    RequestCancelledError,
    StoreUnavailableError,
)
from hotswap_server.metrics import Metrics, MetricsServer
from hotswap_server.metrics.families import STEP_BUCKETS
from hotswap_server.metrics.gaps import BulkHistogram
from hotswap_server.metrics.labels import MAX_NAMES, OTHER
from hotswap_server.metrics.tiers import MAX_SHOWN
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

REF = AdapterRef("a/x", 1, "d", "lora")
REF_0 = AdapterRef("a/0", 1, "d", "lora")
LABELS = {"method": "lora", "path": "batched"}


def record(**fields) -> RequestRecord:
    given = {
        "method": "lora",
        "path": ServingPath.BATCHED,
        "finish_reason": FinishReason.LENGTH,
        "error": None,
        "num_prompt_tokens": 10,
        "num_generated_tokens": 3,
        "timings": Timings(1.0, 2.0, 3.0, 4.0),
        "ttft": 0.5,
        "inter_token": (0.1, 0.3),
    }
    return RequestRecord(**(given | fields))


def step(prefill: int, decode: int) -> StepRecord:
    return StepRecord(0.25, prefill, decode, 4, 2, 4, 0, 1, 10)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"hotswap_{name}", labels)


def test_a_finished_request_counts_its_tokens_and_times(metrics):
    metrics.finished(record())
    assert sample(metrics, "prompt_tokens_total", **LABELS) == 10
    assert sample(metrics, "generated_tokens_total", **LABELS) == 3
    assert sample(metrics, "time_to_first_token_seconds_sum", **LABELS) == 0.5
    assert sample(metrics, "inter_token_seconds_sum", **LABELS) == pytest.approx(0.4)
    stages = ("queue", "load", "prefill", "decode")
    assert [sample(metrics, f"{stage}_seconds_sum", **LABELS) for stage in stages] == [1, 2, 3, 4]
    assert sample(metrics, "engine_requests_total", **LABELS, finish_reason="length") == 1


def test_the_base_is_a_method_of_its_own(metrics):
    metrics.finished(record(method="none", path=ServingPath.BASE, finish_reason=None, ttft=None))
    assert sample(metrics, "engine_requests_total", method="base", path="base", finish_reason="scored") == 1


def test_a_failed_request_is_counted_by_its_reason_and_not_timed(metrics):
    metrics.finished(record(finish_reason=None, error=EngineError("no")))
    metrics.finished(record(finish_reason=None, error=RuntimeError("no")))
    assert sample(metrics, "engine_requests_total", **LABELS, finish_reason="engine_failed") == 1
    assert sample(metrics, "engine_requests_total", **LABELS, finish_reason="internal") == 1
    assert sample(metrics, "decode_seconds_count", **LABELS) == 0


@pytest.mark.parametrize(
    ("prefill", "decode", "phase"), [(5, 0, "prefill"), (0, 4, "decode"), (5, 4, "mixed")]
)
def test_a_step_is_timed_by_what_it_did(metrics, prefill, decode, phase):
    metrics.step(step(prefill, decode))
    assert sample(metrics, "step_seconds_sum", phase=phase) == 0.25
    assert (sample(metrics, "step_tokens_total", phase="prefill") or 0) == prefill
    assert (sample(metrics, "step_tokens_total", phase="decode") or 0) == decode
    assert (sample(metrics, "batch_size_sum"), sample(metrics, "batch_adapters_sum")) == (4, 2)


def test_gauges_are_read_when_scraped(metrics):
    load = SimpleNamespace(
        running=1,
        waiting=2,
        kv_pages_used=3,
        kv_pages_total=4,
        kv_pages_prefixes=1,
        preemptions=9,
        sound=True,
        steps_failed=5,
        steps_stuck=1,
        adapters_quarantined=2,
    )
    slots = {"lora": SlotStats(1, 16, 0, 0)}
    host = HostStats(10, 20, 1, 3, 4)
    metrics.watch_engine(lambda: load)
    metrics.watch_adapters(lambda: slots, lambda: host, list)
    load.running, slots["lora"] = 7, SlotStats(2, 16, 1, 5, 6, 1000)
    names = ("requests_running", "requests_waiting", "kv_pages_used", "kv_pages", "kv_pages_prefixes")
    assert [sample(metrics, name) for name in names] == [7, 2, 3, 4, 1]
    assert sample(metrics, "preemptions_total") == 9
    assert sample(metrics, "adapter_swaps_total", method="lora") == 6
    assert sample(metrics, "adapter_bank_bytes", method="lora") == 1000
    assert sample(metrics, "adapter_slots_used", method="lora") == 2
    assert sample(metrics, "adapter_slots", method="lora") == 16
    assert sample(metrics, "adapters_pinned", method="lora") == 1
    assert sample(metrics, "adapters_underway", method="lora") == 5
    names = ("bytes", "budget_bytes", "adapters", "hits_total", "misses_total")
    assert [sample(metrics, f"host_cache_{name}") for name in names] == [10, 20, 1, 3, 4]


def test_adapters_coming_and_going_are_counted(metrics):
    metrics.loaded(LoadRecord(REF, 0.5, 0.1))
    metrics.evicted(REF, Residency.DEVICE)
    metrics.evicted(REF, Residency.HOST)
    metrics.retried(REF, StoreUnavailableError("away"))
    metrics.failed(REF, AdapterInvalidError("no"))
    assert sample(metrics, "adapter_load_seconds_sum", method="lora") == 0.5
    assert sample(metrics, "adapter_slot_wait_seconds_sum", method="lora") == 0.1
    for tier in ("device", "host"):
        assert sample(metrics, "adapter_evictions_total", method="lora", tier=tier) == 1
    assert sample(metrics, "adapter_load_retries_total", method="lora", reason="store_unavailable") == 1
    assert sample(metrics, "adapter_load_failures_total", method="lora", reason="adapter_invalid") == 1


def test_an_adapter_has_a_series_as_long_as_it_is_in_memory(metrics):
    other = AdapterRef("a/y", 2, "e", "lora")
    memory = [ResidentAdapter(REF, Residency.DEVICE, 10), ResidentAdapter(other, Residency.HOST, 5)]
    host = HostStats(0, 0, 0, 0, 0)
    metrics.watch_adapters(lambda: {"lora": SlotStats(1, 16, 0, 0)}, lambda: host, lambda: list(memory))
    resident = {"adapter": "a/x", "version": "1", "method": "lora", "tier": "device"}
    assert sample(metrics, "adapter_resident", **resident) == 1
    assert sample(metrics, "adapter_bytes", method="lora", tier="host") == 5
    assert sample(metrics, "adapters_resident", method="lora", tier="device") == 1
    del memory[0]
    assert sample(metrics, "adapter_resident", **resident) is None
    assert sample(metrics, "adapter_bytes", method="lora", tier="device") == 0


def test_adapters_in_memory_beyond_the_first_share_a_series(metrics):
    memory = [
        ResidentAdapter(AdapterRef(f"a/{number:04}", 1, "d", "lora"), Residency.HOST, 1)
        for number in range(MAX_SHOWN + 7)
    ]
    host = HostStats(0, 0, 0, 0, 0)
    metrics.watch_adapters(dict, lambda: host, lambda: memory)
    rest = {"adapter": OTHER, "version": "", "method": "", "tier": "host"}
    assert sample(metrics, "adapter_resident", **rest) == 7


def test_requests_are_counted_by_adapter_up_to_a_number_of_names(metrics):
    for number in range(MAX_NAMES + 3):
        ref = AdapterRef(f"a/{number}", 1, "d", "lora")
        metrics.finished(record(adapter=ref))
        metrics.finished(record(adapter=ref, finish_reason=None, error=EngineError("no")))
    metrics.finished(
        record(adapter=REF_0, finish_reason=None, error=RequestCancelledError("the caller left"))
    )
    own = {"adapter": "a/0", "method": "lora"}
    assert sample(metrics, "adapter_requests_total", **own, outcome="ok") == 1
    assert sample(metrics, "adapter_requests_total", **own, outcome="error") == 1
    assert sample(metrics, "adapter_requests_total", **own, outcome="cancelled") == 1
    rest = {"adapter": OTHER, "method": "lora", "outcome": "ok"}
    assert sample(metrics, "adapter_requests_total", **rest) == 3
    [family] = [f for f in metrics.registry.collect() if f.name == "hotswap_adapter_requests"]
    assert len({sample.labels["adapter"] for sample in family.samples}) == MAX_NAMES + 1


def test_tenants_are_told_apart_only_if_asked(metrics):
    asked = Metrics(tenants=True)
    for each in (metrics, asked):
        each.finished(record(adapter=REF))
    assert sample(asked, "tenant_requests_total", tenant="a", outcome="ok") == 1
    assert sample(asked, "tenant_tokens_total", tenant="a", kind="prompt") == 10
    assert sample(asked, "tenant_tokens_total", tenant="a", kind="generated") == 3
    assert not any("tenant" in s.labels for family in metrics.registry.collect() for s in family.samples)


def test_known_series_are_there_before_anything_happens(metrics):
    assert sample(metrics, "requests_total", rpc="Generate", method="lora", code="INTERNAL") == 0
    for method, path in (("base", "base"), ("lora", "batched"), ("lora", "merged"), ("prefix", "batched")):
        labels = {"method": method, "path": path}
        assert sample(metrics, "engine_requests_total", **labels, finish_reason="length") == 0
        assert sample(metrics, "generated_tokens_total", **labels) == 0
        assert sample(metrics, "inter_token_seconds_count", **labels) == 0
        assert sample(metrics, "end_to_end_seconds_count", **labels) == 0
    assert sample(metrics, "step_seconds_count", phase="mixed") == 0
    assert sample(metrics, "adapter_loads_total", method="ia3") == 0


@given(st.lists(st.floats(0, 5), max_size=50))
def test_the_bulk_histogram_is_the_library_s(values):
    registry, plain = CollectorRegistry(), CollectorRegistry()
    bulk = BulkHistogram("gaps", "Text.", ("method",), STEP_BUCKETS)
    registry.register(bulk)
    bulk.touch("lora")
    bulk.observe(("lora",), values)
    theirs = Histogram("gaps", "Text.", ("method",), registry=plain, buckets=STEP_BUCKETS).labels("lora")
    for value in values:
        theirs.observe(value)
    ours, expected = (
        {(s.name, tuple(s.labels.items())): s.value for family in r.collect() for s in family.samples}
        for r in (registry, plain)
    )
    assert ours == pytest.approx(expected)


def test_calls_in_flight_return_to_zero(metrics):
    metrics.call_started("Generate")
    assert sample(metrics, "requests_in_flight", rpc="Generate") == 1
    metrics.call_ended("Generate", "lora", "OK", 0.5)
    assert sample(metrics, "requests_in_flight", rpc="Generate") == 0
    assert sample(metrics, "requests_total", rpc="Generate", method="lora", code="OK") == 1


def test_two_servers_in_a_process_do_not_share_numbers(metrics):
    metrics.evicted(REF, Residency.DEVICE)
    assert sample(Metrics(), "adapter_evictions_total", method="lora", tier="device") == 0


def test_the_endpoint_answers_until_it_is_closed(metrics, unused_tcp_port):
    metrics.describe_build(version="1.2.3")
    server = MetricsServer(metrics, "127.0.0.1", unused_tcp_port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as reply:
            text = reply.read().decode()
    finally:
        server.close()
    assert 'hotswap_build_info{version="1.2.3"} 1.0' in text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert names
    assert all(name.startswith("hotswap_") for name in names)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0


def test_tenants_are_shown_only_if_asked_for_and_only_the_busiest(metrics):
    load = {f"t{index}": (1, 0) for index in range(70)} | {"acme": (3, 2)}
    assert sample(metrics, "tenant_requests_running", tenant="acme") is None
    metrics.watch_tenants(lambda: load)
    assert sample(metrics, "tenant_requests_running", tenant="acme") == 3
    assert sample(metrics, "tenant_requests_waiting", tenant="acme") == 2
    assert sample(metrics, "tenant_requests_running", tenant="_other") == 7
