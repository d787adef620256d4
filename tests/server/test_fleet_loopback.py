"""The fleet model beside two and three real servers on loopback, of the same costs and asked the same."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hotswap_server.bench.costs import Plan, measure_costs, write_store
from hotswap_server.bench.served import Answer, Ask, Served, send, served
from hotswap_server.fleet import Costs, Fleet, Traffic, simulate
from hotswap_server.fleet.arrivals import draw, ring_homes, route

TOLERANCE = 0.2
ADAPTERS, SLOTS, HOST_ENTRIES = 36, 4, 7
BATCH, BATCH_TOKENS, RANK = 8, 128, 8
OPTIONS = ("--threads", "1", "--calibrate-interval", "0", "--log-level", "error")
SECONDS = float(os.environ.get("HOTSWAP_FLEET_SECONDS", "90"))
UTILISATION = float(os.environ.get("HOTSWAP_FLEET_UTILISATION", "0.2"))


@pytest.fixture(scope="module")
def small_base(tmp_path_factory) -> Path:
    """Large enough for steps of milliseconds: of those of a tiny base most would be gRPC's."""
    import torch
    from support.models import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("small-base")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_model_is_within_a_fifth_of_real_replicas(small_base, tmp_path, record_property):
    names, vocab_size = write_store(small_base, tmp_path, ADAPTERS, RANK)
    plan = Plan(max_batch=BATCH, rank=RANK, rounds=3, max_batch_tokens=BATCH_TOKENS)
    costs = measure_costs(small_base, plan, options=OPTIONS)
    print(
        f"\ncall {costs.call_seconds * 1e3:.1f} ms, load {costs.load_seconds * 1e3:.1f}, "
        f"swap {costs.swap_seconds * 1e3:.1f}; {costs.about}"
    )
    costs.write(tmp_path / "costs.json")
    record_property("costs", (tmp_path / "costs.json").read_text())
    wrong = []
    for replicas in (2, 3):
        fleet, traffic = describe(costs, replicas)
        expected, found = (
            simulated(costs, fleet, traffic),
            measured(small_base, tmp_path, names, vocab_size, costs, fleet, traffic),
        )
        for name, value in found.items():
            ratio = expected[name] / value
            print(
                f"{replicas} replicas, {name:16} real {value:.5f}, model {expected[name]:.5f}: "
                f"{ratio - 1:+.1%}"
            )
            if abs(ratio - 1) > TOLERANCE:
                wrong.append((replicas, name, value, expected[name]))
    assert not wrong


def describe(costs: Costs, replicas: int) -> tuple[Fleet, Traffic]:
    """Replicas that share two cores without much waiting for one another, which the model leaves out."""
    fleet = Fleet(
        replicas=replicas,
        adapter_slots=SLOTS,
        host_cache_bytes=HOST_ENTRIES * costs.adapter_bytes + costs.adapter_bytes // 2,
        max_batch_size=BATCH,
        max_batch_tokens=BATCH_TOKENS,
    )
    shape = {"prompt_tokens": 64, "output_tokens": 24}
    lone = costs.step.time(64, 1, 1, 0, 64 * 32) + 23 * costs.step.time(1, 1, 1, 76, 0)
    # With several in a batch they take less together, so this is less than it says.
    rate = replicas * UTILISATION / lone
    return fleet, Traffic(rate, ADAPTERS, 1.0, length_cv=0.5, seconds=SECONDS, warmup=0.0, seed=1, **shape)


def simulated(costs: Costs, fleet: Fleet, traffic: Traffic) -> dict[str, float]:
    report = simulate(costs, fleet, traffic)
    print(f"{fleet.replicas} replicas, {report.requests} requests, in steps {report.utilisation:.0%}")
    return {
        "TTFT p50": report.ttft.p50,
        "TTFT p95": report.ttft.p95,
        "ITL p50": report.itl.p50,
        "ITL p95": report.itl.p95,
        "device hit rate": report.device_hit_rate,
        "host hit rate": report.host_hit_rate,
    }


def measured(base, store, names, vocab_size, costs, fleet: Fleet, traffic: Traffic) -> dict[str, float]:
    arrivals = draw(traffic)
    homes = route(fleet, arrivals)
    flags = (
        *("--adapter-slots", str(fleet.adapter_slots), "--host-cache-bytes", str(fleet.host_cache_bytes)),
        *("--max-batch-size", str(fleet.max_batch_size), "--max-batch-tokens", str(fleet.max_batch_tokens)),
        *("--max-lora-rank", str(RANK), *OPTIONS),
    )
    source = np.random.default_rng(0)

    def ask(adapter: int, prompt: int, new_tokens: int, after: float, server: int) -> Ask:
        ids = source.integers(2, vocab_size, prompt).tolist()
        return Ask(names[adapter], ids, new_tokens, after, server)

    with ExitStack() as stack:
        servers = [stack.enter_context(served(base, store, *flags)) for _ in range(fleet.replicas)]
        # As the model starts: every adapter once, the most popular last.
        where = ring_homes(traffic.adapters, fleet.replicas, fleet.ring_size)
        for adapter in range(traffic.adapters - 1, -1, -1):
            send(servers, [ask(adapter, 16, 2, 0.0, int(where[adapter]))])
        for server in range(fleet.replicas):  # shapes that were not seen yet
            warm = int(np.flatnonzero(where == server)[0])
            for together in (2, 4, 8):
                send(servers, [ask(warm, 60, 6, 0.0, server) for _ in range(together)])
        before = counts(servers)
        columns = (arrivals.adapters, arrivals.prompts, arrivals.outputs, arrivals.times, homes)
        asks = [ask(*(value.item() for value in row)) for row in zip(*columns, strict=True)]
        answers: list[Answer] = send(servers, asks)
        placed, read = (after - b for after, b in zip(counts(servers), before, strict=True))
    ttft = [answer.ttft for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps]
    return {
        "TTFT p50": float(np.quantile(ttft, 0.5)),
        "TTFT p95": float(np.quantile(ttft, 0.95)),
        "ITL p50": float(np.quantile(gaps, 0.5)),
        "ITL p95": float(np.quantile(gaps, 0.95)),
        "device hit rate": 1 - placed / len(answers),
        "host hit rate": 1 - read / placed,
    }


def counts(servers: list[Served]) -> tuple[float, float]:
    """Adapters that came to slots, and those of them that the store was asked for."""
    found = [server.metrics() for server in servers]
    return (
        sum(each["hotswap_adapter_loads_total"] for each in found),
        sum(each["hotswap_host_cache_misses_total"] for each in found),
    )
