"""What two scrapes say about the time between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hotswap_client.cli.top.scrape import Sample, Scrape


@dataclass(frozen=True, slots=True)
class Quantiles:
    """In seconds, from histogram buckets; None without any observation."""

    p50: float | None
    p95: float | None


@dataclass(frozen=True, slots=True)
class MethodFigures:
    """Of one method and path. `overhead` is that of its largest calibrated batch, None if never measured."""

    method: str
    path: str
    requests_per_second: float
    tokens_per_second: float
    first_token: Quantiles
    inter_token: Quantiles
    end_to_end: Quantiles
    overhead: float | None


@dataclass(frozen=True, slots=True)
class AdapterFigures:
    """Of one method: slots, adapters and their bytes by tier, and what came and went per second."""

    method: str
    slots_used: int
    slots: int
    pinned: int
    underway: int
    on_device: int
    in_host: int
    device_bytes: float
    host_bytes: float
    loads_per_second: float
    swaps_per_second: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Rates are per second over `seconds`. Where that is 0, all figures are of the time since the server's
    start, and rates are what there was in all."""

    version: str
    base: str
    device: str
    seconds: float
    running: int
    waiting: int
    kv_pages: int
    kv_pages_used: int
    kv_pages_prefixes: int
    preemptions_per_second: float
    calls_per_second: float
    codes: Mapping[str, float]
    prompt_tokens_per_second: float
    generated_tokens_per_second: float
    steps: Mapping[str, Quantiles]
    batch_size: float | None
    batch_adapters: float | None
    queue: Quantiles
    load: Quantiles
    methods: tuple[MethodFigures, ...]
    adapters: tuple[AdapterFigures, ...]
    merged: int


def figures(before: Scrape | None, now: Scrape) -> Figures:
    """The figures of the time between two scrapes, or without `before` of all time since the start."""
    change = _Change(before, now)
    [build] = now.of("build_info")[:1] or [Sample({}, 1.0)]
    return Figures(
        version=build.labels.get("version", ""),
        base=build.labels.get("base", ""),
        device=build.labels.get("device", ""),
        seconds=change.seconds,
        running=int(now.total("requests_running")),
        waiting=int(now.total("requests_waiting")),
        kv_pages=int(now.total("kv_pages")),
        kv_pages_used=int(now.total("kv_pages_used")),
        kv_pages_prefixes=int(now.total("kv_pages_prefixes")),
        preemptions_per_second=change.rate("preemptions_total"),
        calls_per_second=change.rate("requests_total"),
        codes=change.by("requests_total", "code"),
        prompt_tokens_per_second=change.rate("prompt_tokens_total"),
        generated_tokens_per_second=change.rate("generated_tokens_total"),
        steps={
            phase: quantiles
            for phase in ("decode", "mixed", "prefill")
            if (quantiles := change.quantiles("step_seconds", phase=phase)).p50 is not None
        },
        batch_size=change.mean("batch_size"),
        batch_adapters=change.mean("batch_adapters"),
        queue=change.quantiles("queue_seconds"),
        load=change.quantiles("load_seconds"),
        methods=_methods(change, now),
        adapters=_adapters(change, now),
        merged=int(now.total("adapters_merged")),
    )


def _methods(change: _Change, now: Scrape) -> tuple[MethodFigures, ...]:
    """Those that have ever had a request, the base first."""
    pairs = {
        (sample.labels["method"], sample.labels["path"])
        for sample in now.of("engine_requests_total")
        if sample.value
    }
    found = []
    for method, path in sorted(pairs, key=lambda pair: (pair[0] != "base", pair)):
        labels = {"method": method, "path": path}
        measured = [s for s in now.of("method_overhead_ratio") if labels.items() <= s.labels.items()]
        largest = max(measured, key=lambda s: int(s.labels.get("batch", 0)), default=None)
        found.append(
            MethodFigures(
                method=method,
                path=path,
                requests_per_second=change.rate("engine_requests_total", **labels),
                tokens_per_second=change.rate("generated_tokens_total", **labels),
                first_token=change.quantiles("time_to_first_token_seconds", **labels),
                inter_token=change.quantiles("inter_token_seconds", **labels),
                end_to_end=change.quantiles("end_to_end_seconds", **labels),
                overhead=None if largest is None else largest.value,
            )
        )
    return tuple(found)


def _adapters(change: _Change, now: Scrape) -> tuple[AdapterFigures, ...]:
    found = []
    for slots in now.of("adapter_slots"):
        method = slots.labels["method"]

        def count(name: str, *, method: str = method, **labels: str) -> float:
            return now.total(name, method=method, **labels)

        found.append(
            AdapterFigures(
                method=method,
                slots_used=int(count("adapter_slots_used")),
                slots=int(slots.value),
                pinned=int(count("adapters_pinned")),
                underway=int(count("adapters_underway")),
                on_device=int(count("adapters_resident", tier="device")),
                in_host=int(count("adapters_resident", tier="host")),
                device_bytes=count("adapter_bytes", tier="device"),
                host_bytes=count("adapter_bytes", tier="host"),
                loads_per_second=change.rate("adapter_loads_total", method=method),
                swaps_per_second=change.rate("adapter_swaps_total", method=method),
            )
        )
    return tuple(found)


class _Change:
    """How counters grew. One that is smaller than before began anew, with its server, and counts as it is."""

    def __init__(self, before: Scrape | None, now: Scrape) -> None:
        self._before = before
        self._now = now
        self.seconds = 0.0 if before is None else now.at - before.at

    def grown(self, name: str, key: Callable[[Sample], object], **labels: str) -> dict[object, float]:
        old = {}
        if self._before is not None:
            old = {frozenset(s.labels.items()): s.value for s in self._before.of(name)}
        found: defaultdict[object, float] = defaultdict(float)
        for sample in self._now.of(name):
            if labels.items() <= sample.labels.items():
                before = old.get(frozenset(sample.labels.items()), 0.0)
                found[key(sample)] += sample.value - before if sample.value >= before else sample.value
        return dict(found)

    def _sum(self, name: str, **labels: str) -> float:
        return sum(self.grown(name, lambda sample: None, **labels).values())

    def rate(self, name: str, **labels: str) -> float:
        return self._sum(name, **labels) / (self.seconds or 1)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Rates by the values of a label, those that are not 0."""
        grown = self.grown(name, lambda sample: sample.labels[label])
        return {
            str(key): value / (self.seconds or 1) for key, value in sorted(grown.items(), key=str) if value
        }

    def mean(self, name: str) -> float | None:
        count = self._sum(f"{name}_count")
        return self._sum(f"{name}_sum") / count if count else None

    def quantiles(self, name: str, **labels: str) -> Quantiles:
        grown = self.grown(f"{name}_bucket", lambda sample: float(sample.labels["le"]), **labels)
        buckets = sorted((float(str(bound)), count) for bound, count in grown.items())
        return Quantiles(quantile(buckets, 0.5), quantile(buckets, 0.95))


def quantile(buckets: list[tuple[float, float]], share: float) -> float | None:
    """As Prometheus has it: linear within a bucket, and the last bound for what lies beyond all.

    `buckets` are upper bounds with cumulated counts, infinity last.
    """
    if len(buckets) < 2 or not buckets[-1][1]:
        return None
    rank = share * buckets[-1][1]
    lower, below = 0.0, 0.0
    for bound, cumulated in buckets[:-1]:
        if cumulated >= rank:
            return (
                lower + (bound - lower) * (rank - below) / (cumulated - below) if cumulated > below else bound
            )
        lower, below = bound, cumulated
    return buckets[-2][0]
