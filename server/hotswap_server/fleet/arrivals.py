"""Who arrives when, and at which replica."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hotswap_server.fleet.options import Fleet, Traffic

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """One entry for each request, in the order of arrival. Adapter 0 is the most popular one."""

    times: Floats
    adapters: Ints
    prompts: Ints
    outputs: Ints

    def __len__(self) -> int:
        return len(self.times)

    def only(self, chosen: Any) -> Arrivals:
        """Those that an index picks."""
        return Arrivals(self.times[chosen], self.adapters[chosen], self.prompts[chosen], self.outputs[chosen])


def draw(traffic: Traffic) -> Arrivals:
    """Requests as `traffic` describes them. The same seed gives the same ones."""
    # A stream for each thing: what is asked stays the same when only the rate changes.
    gaps, which, lengths = np.random.default_rng(traffic.seed).spawn(3)
    count = gaps.poisson(traffic.rate * traffic.seconds)
    times = np.sort(gaps.uniform(0.0, traffic.seconds, count))
    cumulative = np.cumsum(popularity(traffic))
    adapters = np.searchsorted(cumulative, which.uniform(0.0, cumulative[-1], count))
    prompts = _lengths(lengths, traffic.prompt_tokens, traffic.length_cv, count)
    outputs = _lengths(lengths, traffic.output_tokens, traffic.length_cv, count)
    return Arrivals(times, adapters.astype(np.int64), prompts, outputs)


def popularity(traffic: Traffic) -> Floats:
    """The share of requests of each adapter."""
    weights = np.arange(1, traffic.adapters + 1, dtype=np.float64) ** -traffic.zipf
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def route(fleet: Fleet, arrivals: Arrivals) -> Ints:
    """The replica of each request."""
    if fleet.affinity == "round-robin":
        return np.arange(len(arrivals), dtype=np.int64) % fleet.replicas
    homes = ring_homes(int(arrivals.adapters.max(initial=0)) + 1, fleet.replicas, fleet.ring_size)
    return np.asarray(homes[arrivals.adapters], dtype=np.int64)


def ring_homes(adapters: int, replicas: int, ring_size: int) -> Ints:
    """The replica of each adapter: that of the next entry on a ring on which each replica has as many.

    The hash is not gRPC's or Envoy's, so which adapter goes where differs; how evenly they spread does not.
    """
    each = -(-ring_size // replicas)
    entries = np.array([_hash(f"replica-{r}_{e}") for r in range(replicas) for e in range(each)], np.uint64)
    order = np.argsort(entries)
    keys = np.array([_hash(f"adapter-{a}") for a in range(adapters)], np.uint64)
    after = np.searchsorted(entries[order], keys) % len(entries)
    return np.asarray(order[after] // each, dtype=np.int64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _lengths(source: np.random.Generator, mean: int, cv: float, count: int) -> Ints:
    if cv == 0:
        return np.full(count, mean, dtype=np.int64)
    variance = np.log1p(cv * cv)
    drawn = source.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), count)
    return np.asarray(np.maximum(1, np.rint(drawn)), dtype=np.int64)
