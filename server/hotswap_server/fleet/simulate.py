"""A fleet's run and its figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hotswap_server.fleet.arrivals import Arrivals, Floats, Ints, draw, ring_homes, route
from hotswap_server.fleet.costs import Costs
from hotswap_server.fleet.options import Fleet, FleetError, Traffic
from hotswap_server.fleet.replica import Replica, ReplicaRun


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds: mean and percentiles."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class FleetReport:
    """What a fleet did after the warm-up. Times in seconds, rates per second of all replicas together.

    `ttft` is the time to the first token of requests that were not refused, `itl` the time between two tokens
    of a request. `device_hit_rate` is the share of requests for which no adapter had to come to a slot,
    `host_hit_rate` the share of adapters that did and were found in host memory: those that many wait for
    count once. `utilisation` is the share of time that replicas spend in steps; `batch` the mean number of
    requests that a decode step advances.
    """

    replicas: int
    requests: int
    refused: int
    ttft: Spread
    itl: Spread
    device_hit_rate: float
    host_hit_rate: float
    loads_per_second: float
    swaps_per_second: float
    output_tokens_per_second: float
    utilisation: float
    utilisation_of_busiest: float
    requests_of_busiest: float  # in those of the mean replica
    batch: float
    preemptions: int


def simulate(costs: Costs, fleet: Fleet, traffic: Traffic, arrivals: Arrivals | None = None) -> FleetReport:
    """Run `traffic`, or the `arrivals` given instead of what would be drawn, on `fleet`.

    The same arguments give the same report.

    Raises:
        FleetError: an adapter or a request does not fit into a replica, or nothing is counted.
    """
    arrivals = draw(traffic) if arrivals is None else arrivals
    if not len(arrivals) or arrivals.times[-1] < traffic.warmup:
        raise FleetError("seconds", "no request arrives after the warm-up; simulate a longer time")
    homes = route(fleet, arrivals)
    runs, ttft = [], np.empty(len(arrivals))
    for replica in range(fleet.replicas):
        mine = np.flatnonzero(homes == replica)
        warm = _warm(fleet, traffic, replica) if traffic.warm else []
        own = arrivals.only(mine)
        run = Replica(costs, fleet, own, warm=warm, seed=traffic.seed * fleet.replicas + replica).run()
        ttft[mine] = run.first - own.times + costs.call_seconds
        runs.append(run)
    counted = arrivals.times >= traffic.warmup
    shares = np.bincount(homes[counted], minlength=fleet.replicas)
    return _report(fleet, traffic, runs, ttft[counted], shares)


def _warm(fleet: Fleet, traffic: Traffic, replica: int) -> list[int]:
    """A replica's adapters, the most popular last."""
    backwards = range(traffic.adapters - 1, -1, -1)
    if fleet.affinity == "round-robin":
        return list(backwards)
    homes = ring_homes(traffic.adapters, fleet.replicas, fleet.ring_size)
    return [adapter for adapter in backwards if homes[adapter] == replica]


def _report(
    fleet: Fleet, traffic: Traffic, runs: list[ReplicaRun], ttft: Floats, shares: Ints
) -> FleetReport:
    begin, end = traffic.warmup, traffic.seconds
    measured = end - begin
    served = ttft[np.isfinite(ttft)]
    # Without the tail in which the last requests end and nobody arrives, which is no steady state.
    within = [(run.step_ends >= begin) & (run.step_ends <= end) for run in runs]
    gaps = [run.step_seconds[chosen] for run, chosen in zip(runs, within, strict=True)]
    rows = [run.step_rows[chosen] for run, chosen in zip(runs, within, strict=True)]
    stalls = [run.stalls[(run.stalls[:, 0] >= begin) & (run.stalls[:, 0] <= end), 1] for run in runs]
    between = np.concatenate([*gaps, *stalls])
    weights = np.concatenate([*rows, np.ones(sum(map(len, stalls)), dtype=np.int64)])
    busy = np.array([float(lengths.sum()) for lengths in gaps]) / measured
    loads, swaps = (
        sum(int(((times >= begin) & (times <= end)).sum()) for times in moments)
        for moments in ([run.loaded_at for run in runs], [run.placed_at for run in runs])
    )
    decode_steps = sum(int((counts > 0).sum()) for counts in rows)
    decoded = sum(int(counts.sum()) for counts in rows)
    requests = len(ttft)
    return FleetReport(
        replicas=fleet.replicas,
        requests=requests,
        refused=requests - len(served),
        ttft=_spread(served, np.ones(len(served), dtype=np.int64)),
        itl=_spread(between, weights),
        device_hit_rate=max(0.0, 1 - swaps / max(requests, 1)),
        host_hit_rate=max(0.0, 1 - loads / swaps) if swaps else 1.0,
        loads_per_second=loads / measured,
        swaps_per_second=swaps / measured,
        output_tokens_per_second=(decoded + len(served)) / measured,
        utilisation=float(busy.mean()),
        utilisation_of_busiest=float(busy.max()),
        requests_of_busiest=float(shares.max() / max(shares.mean(), 1e-9)),
        batch=decoded / max(decode_steps, 1),
        preemptions=sum(run.preemptions for run in runs),
    )


def _spread(values: Floats, weights: Ints) -> Spread:
    """Each value counts as often as its weight says; nan where there is none."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    cumulative = np.cumsum(weights)
    if not len(values) or cumulative[-1] == 0:
        return Spread(*[float("nan")] * 4)
    points = [
        float(values[np.searchsorted(cumulative, share * cumulative[-1])]) for share in (0.5, 0.95, 0.99)
    ]
    return Spread(float((values * weights).sum() / cumulative[-1]), *points)
