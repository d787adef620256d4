"""The engine's steps, and what is in it at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hotswap_server.engine.observer import StepRecord
from hotswap_server.metrics.families import SIZE_BUCKETS, STEP_BUCKETS, Families


class EngineLoad(Protocol):
    """What is in the engine at this moment; see `EngineStats`."""

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def kv_pages_used(self) -> int: ...

    @property
    def kv_pages_total(self) -> int: ...

    @property
    def kv_pages_prefixes(self) -> int: ...

    @property
    def preemptions(self) -> int: ...

    @property
    def sound(self) -> bool: ...

    @property
    def steps_failed(self) -> int: ...

    @property
    def steps_stuck(self) -> int: ...

    @property
    def adapters_quarantined(self) -> int: ...


class StepMetrics:
    """Called on the engine's thread after every step, so all series are looked up beforehand."""

    def __init__(self, make: Families) -> None:
        seconds = make.histogram(
            "step_seconds",
            "Wall time of a step that did prefill, decode or both.",
            "phase",
            buckets=STEP_BUCKETS,
        )
        self._prefill, self._decode, self._mixed = (
            seconds.labels(phase) for phase in ("prefill", "decode", "mixed")
        )
        tokens = make.counter("step_tokens", "Tokens that steps computed.", "phase")
        self._prefill_tokens, self._decode_tokens = tokens.labels("prefill"), tokens.labels("decode")
        self._batch_size = make.histogram("batch_size", "Requests in a step.", buckets=SIZE_BUCKETS)
        self._batch_adapters = make.histogram(
            "batch_adapters", "Adapters in a step.", buckets=(0, *SIZE_BUCKETS)
        )

    def step(self, record: StepRecord) -> None:
        prefill, decode = record.num_prefill_tokens, record.num_decode_tokens
        if prefill:
            (self._mixed if decode else self._prefill).observe(record.seconds)
            self._prefill_tokens.inc(prefill)
        elif decode:
            self._decode.observe(record.seconds)
        else:
            return
        if decode:
            self._decode_tokens.inc(decode)
        self._batch_size.observe(record.batch_size)
        self._batch_adapters.observe(record.distinct_adapters)


class EngineCollector(Collector):
    """Reads the engine once for each scrape."""

    def __init__(self, load: Callable[[], EngineLoad]) -> None:
        self._load = load

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        gauges = (
            ("requests_running", "Requests in the batch.", load.running),
            ("requests_waiting", "Requests that wait for a place or an adapter.", load.waiting),
            ("kv_pages", "Pages of the key-value cache.", load.kv_pages_total),
            ("kv_pages_used", "Those in use, prefixes' included.", load.kv_pages_used),
            ("kv_pages_prefixes", "Those that prefixes hold, whoever runs.", load.kv_pages_prefixes),
            ("engine_sound", "1, or 0 while steps fail one after another or one is stuck.", load.sound),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"hotswap_{name}", text, value)
        counters = (
            ("preemptions", "Requests that gave their pages back to be computed anew.", load.preemptions),
            ("steps_failed", "Steps that raised.", load.steps_failed),
            ("steps_stuck", "Steps that took longer than step_timeout.", load.steps_stuck),
            (
                "adapters_quarantined",
                "Adapters whose logits were not finite.",
                load.adapters_quarantined,
            ),
        )
        for name, text, value in counters:
            yield CounterMetricFamily(f"hotswap_{name}", text, value)
