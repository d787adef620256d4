"""The simulation of a fleet: conservation, known queueing and caching results, its fast path, its bounds."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hotswap_server.fleet import (
    Costs,
    Fleet,
    FleetError,
    StepCosts,
    Target,
    Traffic,
    replicas_needed,
    simulate,
)
from hotswap_server.fleet.arrivals import Arrivals, draw, popularity, ring_homes
from hotswap_server.fleet.replica import Replica
from hypothesis import given, settings
from hypothesis import strategies as st

STEP = StepCosts(
    tokens=(1, 32, 128, 512),
    seconds=(0.008, 0.010, 0.016, 0.045),
    per_row=1e-5,
    per_adapter=3e-5,
    per_context_token=1e-7,
    per_prompt_pair=1e-9,
    noise=(0.9, 0.95, 1.0, 1.02, 1.3),
)
COSTS = Costs(STEP, call_seconds=0.003, load_seconds=0.05, swap_seconds=0.005, adapter_bytes=1000)


def batch_of(count, *, prompt=10, output=5, adapters=1, every=0.0) -> Arrivals:
    index = np.arange(count)
    return Arrivals(every * index, index % adapters, np.full(count, prompt), np.full(count, output))


@given(
    seed=st.integers(0, 10_000),
    slots=st.integers(1, 5),
    host=st.integers(1, 8),
    batch=st.integers(1, 6),
    budget=st.integers(6, 40),
    kv_pages=st.one_of(st.none(), st.integers(5, 12)),
    rate=st.sampled_from([2.0, 20.0, 200.0]),
    warm=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_request_ends_once_with_all_its_tokens(seed, slots, host, batch, budget, kv_pages, rate, warm):
    fleet = Fleet(
        adapter_slots=slots,
        host_cache_bytes=host * COSTS.adapter_bytes,
        max_batch_size=batch,
        max_batch_tokens=budget,
        kv_tokens=None if kv_pages is None else 16 * kv_pages,
    )
    traffic = Traffic(
        rate, adapters=12, prompt_tokens=20, output_tokens=9, seconds=60 / rate, warmup=0, seed=seed
    )
    arrivals = draw(traffic)
    run = Replica(COSTS, fleet, arrivals, warm=range(12) if warm else (), seed=seed).run()
    assert np.isfinite(run.first).all()
    assert (run.first > arrivals.times).all()
    assert (run.last >= run.first).all()
    assert run.step_rows.max(initial=0) <= batch
    # A first token for each request; each other one ends a gap.
    assert len(arrivals) + run.step_rows.sum() + len(run.stalls) == arrivals.outputs.sum()
    assert (run.preemptions == 0) or kv_pages is not None
    assert len(run.placed_at) >= len(run.loaded_at) - host


def test_a_full_queue_refuses_and_the_rest_is_served():
    run = Replica(COSTS, Fleet(max_queue=10, max_batch_size=2), batch_of(50)).run()
    assert np.isfinite(run.last).sum() == 10
    assert run.step_rows.sum() == 10 * 4


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_one_place_and_equal_steps_are_an_m_d_1_queue(rho):
    service = 0.02
    costs = Costs(StepCosts((1,), (service,)), 0.0, 0.0, 0.0, 1)
    traffic = Traffic(rho / service, adapters=1, prompt_tokens=1, output_tokens=1, seconds=1200, warmup=10)
    report = simulate(costs, Fleet(max_batch_size=1, max_queue=10**6), traffic)
    # Pollaczek-Khinchine with no variance of service.
    assert report.ttft.mean == pytest.approx(service * (1 + rho / (2 * (1 - rho))), rel=0.05)
    assert report.utilisation == pytest.approx(rho, rel=0.03)


def test_one_place_and_exponential_steps_are_an_m_m_1_queue():
    service, rho = 0.02, 0.7
    shares = (np.arange(4000) + 0.5) / 4000
    exponential = tuple(float(q) for q in -np.log1p(-shares))
    costs = Costs(StepCosts((1,), (service,), noise=exponential), 0.0, 0.0, 0.0, 1)
    traffic = Traffic(rho / service, adapters=1, prompt_tokens=1, output_tokens=1, seconds=1500, warmup=10)
    report = simulate(costs, Fleet(max_batch_size=1, max_queue=10**6), traffic)
    sojourn = service / (1 - rho)
    assert report.ttft.mean == pytest.approx(sojourn, rel=0.07)
    assert report.ttft.p95 == pytest.approx(-math.log(0.05) * sojourn, rel=0.1)


def che_hit_rate(traffic: Traffic, entries: int) -> float:
    """Che, Tung and Wang, "Hierarchical Web Caching Systems", IEEE JSAC 2002: an LRU's hits under independent
    requests."""
    shares = popularity(traffic)
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-shares * middle)).sum() < entries else (low, middle)
    return float((shares * (1 - np.exp(-shares * low))).sum())


@pytest.mark.parametrize("zipf", [0.6, 1.0])
@pytest.mark.parametrize("entries", [8, 60])
def test_hits_of_slots_and_host_memory_are_those_of_an_lru(zipf, entries):
    # So little load that requests do not meet, for which alone the approximation holds.
    costs = Costs(StepCosts((1,), (0.001,)), 0.0, 1e-4, 1e-5, 1)
    traffic = Traffic(10, 300, zipf, prompt_tokens=1, output_tokens=1, seconds=1000, warmup=150)
    expected = che_hit_rate(traffic, entries)
    slots = simulate(costs, Fleet(adapter_slots=entries), traffic)
    assert slots.device_hit_rate == pytest.approx(expected, abs=0.02)
    # With one slot all but repetitions ask host memory.
    host = simulate(costs, Fleet(adapter_slots=1, host_cache_bytes=entries), traffic)
    loads_per_request = host.loads_per_second * (traffic.seconds - traffic.warmup) / host.requests
    assert 1 - loads_per_request == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("kv_tokens", [None, 640])
def test_many_steps_at_once_are_as_many_single_ones(monkeypatch, kv_tokens):
    fleet = Fleet(adapter_slots=4, host_cache_bytes=20_000, max_batch_size=16, kv_tokens=kv_tokens)
    traffic = Traffic(9.0, 40, prompt_tokens=100, output_tokens=60, length_cv=0.5, seconds=40)
    arrivals = draw(traffic)
    fast = Replica(COSTS, fleet, arrivals, seed=3).run()
    monkeypatch.setattr(Replica, "_many", lambda self, next_arrival: False)
    slow = Replica(COSTS, fleet, arrivals, seed=3).run()
    assert len(fast.step_ends) == len(slow.step_ends)
    for name in (
        "first",
        "last",
        "step_ends",
        "step_seconds",
        "step_rows",
        "stalls",
        "loaded_at",
        "placed_at",
    ):
        np.testing.assert_allclose(getattr(fast, name), getattr(slow, name), rtol=1e-9, err_msg=name)
    assert fast.preemptions == slow.preemptions
    assert (fast.preemptions > 0) == (kv_tokens is not None)


def test_the_same_seed_gives_the_same_report_and_another_one_another():
    fleet, traffic = Fleet(replicas=3, adapter_slots=4), Traffic(6.0, 50, seconds=40, warmup=5, length_cv=1.0)
    report = simulate(COSTS, fleet, traffic)
    assert simulate(COSTS, fleet, traffic) == report
    assert simulate(COSTS, fleet, replace(traffic, seed=1)) != report
    assert json.loads(json.dumps(asdict(report))) == asdict(report)


def test_more_of_a_resource_is_no_worse_and_more_load_no_better():
    traffic = Traffic(12.0, 200, 0.8, prompt_tokens=100, output_tokens=64, seconds=60, warmup=10)
    fleet = Fleet(replicas=2, adapter_slots=16, host_cache_bytes=40_000, affinity="round-robin")

    def with_fleet(**changes):
        return simulate(COSTS, replace(fleet, **changes), traffic)

    by_rate = [simulate(COSTS, fleet, replace(traffic, rate=rate)) for rate in (4.0, 12.0, 24.0)]
    assert np.all(np.diff([r.ttft.p95 for r in by_rate]) > 0)
    assert np.all(np.diff([r.itl.p50 for r in by_rate]) > 0)
    assert np.all(np.diff([with_fleet(replicas=n).ttft.p95 for n in (1, 2, 4)]) < 0)
    assert np.all(np.diff([with_fleet(adapter_slots=n).device_hit_rate for n in (4, 16, 64)]) > 0)
    assert np.all(np.diff([with_fleet(host_cache_bytes=n).host_hit_rate for n in (20_000, 60_000)]) > 0)
    assert np.all(np.diff([with_fleet(store_latency=s).ttft.p95 for s in (0.0, 0.5)]) > 0)
    assert with_fleet(affinity="ring").device_hit_rate > with_fleet().device_hit_rate


def test_a_lone_request_costs_what_its_steps_do():
    exact = replace(COSTS, step=replace(STEP, noise=(1.0,)))
    run = Replica(exact, Fleet(max_batch_tokens=64), batch_of(1, prompt=100, output=3)).run()
    chunks = [exact.step.time(64, 0, 1, 0, 64 * 32), exact.step.time(36, 1, 1, 0, 36 * (64 + 18))]
    decode = [exact.step.time(1, 1, 1, context, 0) for context in (100, 101)]
    loaded = exact.load_seconds + exact.swap_seconds
    assert run.first[0] == pytest.approx(loaded + sum(chunks))
    np.testing.assert_allclose(run.step_seconds, [*chunks, *decode])
    assert (len(run.loaded_at), len(run.placed_at)) == (1, 1)


def test_others_decode_while_an_adapter_loads():
    slow = replace(COSTS, load_seconds=1.0)
    arrivals = Arrivals(np.array([0.0, 0.1]), np.array([0, 1]), np.array([10, 10]), np.array([50, 5]))
    run = Replica(slow, Fleet(), arrivals, warm=[0]).run()
    assert run.last[0] < 1.0 < run.first[1]
    assert run.step_seconds.max() < 0.1


def test_an_adapter_that_others_use_all_the_time_makes_way_in_the_end():
    # Two that overlap for ever keep the only slot; without patience the third would never have it.
    steady = batch_of(400, output=30, every=0.1)
    intruder = Arrivals(np.array([2.0]), np.array([1]), np.array([10]), np.array([5]))
    columns = zip(*((a.times, a.adapters, a.prompts, a.outputs) for a in (steady, intruder)), strict=True)
    merged = Arrivals(*(np.concatenate(column) for column in columns))
    merged = merged.only(np.argsort(merged.times))
    run = Replica(COSTS, Fleet(adapter_slots=1), merged).run()
    [who] = np.flatnonzero(merged.adapters == 1)
    assert run.first[who] - 2.0 < 3.0


def test_a_ring_moves_few_adapters_when_a_replica_joins():
    before, after = ring_homes(2000, 4, 1024), ring_homes(2000, 5, 1280)
    assert set(before) == set(range(4))
    assert (before != after).mean() == pytest.approx(1 / 5, abs=0.05)
    assert set(after[before != after]) == {4}


def test_the_search_finds_the_fewest_replicas_that_meet_the_target():
    fleet, traffic = Fleet(affinity="round-robin"), Traffic(40.0, 20, output_tokens=64, seconds=30, warmup=5)
    target = Target(ttft_p95=0.25, itl_p95=0.04)
    found = replicas_needed(COSTS, fleet, traffic, target)
    assert found.replicas is not None
    assert target.met(simulate(COSTS, replace(fleet, replicas=found.replicas), traffic))
    assert found.replicas > 1
    assert not target.met(simulate(COSTS, replace(fleet, replicas=found.replicas - 1), traffic))
    nothing = replicas_needed(COSTS, fleet, traffic, Target(ttft_p95=0.001), max_replicas=6)
    assert nothing.replicas is None
    assert [report.replicas for report in nothing.reports] == [1, 2, 4, 6]
    assert nothing.report.replicas == 6


def test_costs_are_read_as_they_were_written(tmp_path):
    COSTS.write(tmp_path / "costs.json")
    assert Costs.read(tmp_path / "costs.json") == COSTS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        ("no json", "is not JSON"),
        ("[]", "is not in the format hotswap-costs/1"),
        ({"load_seconds": -1}, "load_seconds: must be a finite number, 0 or more, got -1"),
        ({"load_seconds": None}, "load_seconds: must be a finite number"),
        ({"adapter_bytes": 0}, "adapter_bytes: must be a whole number over 0"),
        ({"weather": 1}, "a field is missing, unknown"),
        ({"step": {"tokens": [1], "seconds": [0.1, 0.2]}}, "step.tokens: must have as many entries"),
        ({"step": {"tokens": [1, 2], "seconds": [0.2, 0.1]}}, "step.seconds: must be over 0 and never fall"),
        ({"step": {"tokens": [2, 1], "seconds": [0.1, 0.2]}}, "step.tokens: must grow"),
        ({"step": {"tokens": [1], "seconds": [0.1], "noise": []}}, "step.noise: must hold"),
        ({"step": {"tokens": [1], "seconds": ["x"]}}, "step.seconds: must be a finite number"),
        ({"step": 3}, "a field is missing"),
    ],
)
def test_a_file_that_holds_no_costs_is_refused_with_the_remedy(tmp_path, content, said):
    path = tmp_path / "costs.json"
    if isinstance(content, dict):
        COSTS.write(path)
        content = json.dumps(json.loads(path.read_text()) | content)
    if content is not None:
        path.write_text(content)
    with pytest.raises(FleetError) as error:
        Costs.read(path)
    assert said in str(error.value)
    assert "hotswap bench --costs" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Fleet(replicas=0), "replicas"),
        (lambda: Fleet(affinity="sticky"), "affinity"),
        (lambda: Fleet(max_batch_size=600), "max_batch_tokens"),
        (lambda: Fleet(store_latency=-0.1), "store_latency"),
        (lambda: Fleet(kv_tokens=0), "kv_tokens"),
        (lambda: Traffic(0), "rate"),
        (lambda: Traffic(float("nan")), "rate"),
        (lambda: Traffic(1, zipf=-1), "zipf"),
        (lambda: Traffic(1, warmup=120), "warmup"),
        (lambda: Traffic(1e6, seconds=1e4), "seconds"),
        (lambda: Target(), "target"),
        (lambda: Target(ttft_p95=0), "ttft_p95"),
        (lambda: simulate(COSTS, Fleet(host_cache_bytes=999), Traffic(1)), "host_cache_bytes"),
        (lambda: simulate(COSTS, Fleet(kv_tokens=320), Traffic(1)), "kv_tokens"),
        (lambda: simulate(COSTS, Fleet(), Traffic(1e-6)), "seconds"),
        (lambda: replicas_needed(COSTS, Fleet(), Traffic(1), Target(1.0), max_replicas=0), "max_replicas"),
    ],
)
def test_a_wrong_number_is_refused_by_the_name_of_its_field(make, field):
    with pytest.raises(FleetError) as error:
        make()
    assert error.value.field == field
