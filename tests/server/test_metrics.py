"""What records become, and the endpoint that shows it."""

from __future__ import annotations

import socket
import urllib.request
from types import SimpleNamespace

import pytest
from hotswap_server.adapters.residency import HostStats, LoadRecord, Residency, SlotStats
from hotswap_server.core import AdapterRef, FinishReason, ServingPath, Timings
from hotswap_server.engine.observer import RequestRecord, StepRecord
from hotswap_server.errors import AdapterInvalidError, EngineError, StoreUnavailableError
from hotswap_server.metrics import Metrics, MetricsServer

REF = AdapterRef("a/x", 1, "d", "lora")
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
    assert sample(metrics, "decode_seconds_count", **LABELS) is None


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
    load = SimpleNamespace(running=1, waiting=2, kv_pages_used=3, kv_pages_total=4)
    slots = {"lora": SlotStats(1, 16, 0, 0)}
    host = HostStats(10, 20, 1, 3, 4)
    metrics.watch_engine(lambda: load)
    metrics.watch_adapters(lambda: slots, lambda: host)
    load.running, slots["lora"] = 7, SlotStats(2, 16, 1, 5)
    names = ("requests_running", "requests_waiting", "kv_pages_used", "kv_pages")
    assert [sample(metrics, name) for name in names] == [7, 2, 3, 4]
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


def test_calls_in_flight_return_to_zero(metrics):
    metrics.call_started("Generate")
    assert sample(metrics, "requests_in_flight", rpc="Generate") == 1
    metrics.call_ended("Generate", "lora", "OK", 0.5)
    assert sample(metrics, "requests_in_flight", rpc="Generate") == 0
    assert sample(metrics, "requests_total", rpc="Generate", method="lora", code="OK") == 1


def test_two_servers_in_a_process_do_not_share_numbers(metrics):
    metrics.evicted(REF, Residency.DEVICE)
    assert sample(Metrics(), "adapter_evictions_total", method="lora", tier="device") is None


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
