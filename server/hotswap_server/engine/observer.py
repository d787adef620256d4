"""What the engine tells to whoever measures it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from hotswap_server.core import AdapterRef, FinishReason, ServingPath, Timings, Trace
from hotswap_server.engine.options import EngineStats
from hotswap_server.engine.scheduler import Scheduled

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step: `seconds` of wall time, what ran in it, and what was left when it ended."""

    seconds: float
    num_prefill_tokens: int
    num_decode_tokens: int
    batch_size: int
    distinct_adapters: int
    running: int
    waiting: int
    kv_pages_used: int
    kv_pages_total: int
    adapter_tokens: Mapping[AdapterRef | None, int] = field(default_factory=dict)
    """The step's tokens by adapter, None being the base."""


def step_record(batch: list[Scheduled], seconds: float, stats: EngineStats) -> StepRecord:
    """The record of a step that took `seconds`."""
    decode = sum(entry.num_new == 1 for entry in batch)
    tokens: Counter[AdapterRef | None] = Counter()
    for entry in batch:
        tokens[entry.sequence.request.adapter] += entry.num_new
    return StepRecord(
        seconds=seconds,
        num_prefill_tokens=tokens.total() - decode,
        num_decode_tokens=decode,
        batch_size=len(batch),
        distinct_adapters=len(tokens.keys() - {None}),
        running=stats.running,
        waiting=stats.waiting,
        kv_pages_used=stats.kv_pages_used,
        kv_pages_total=stats.kv_pages_total,
        adapter_tokens=tokens,
    )


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request that ended. Exactly one of `finish_reason` and `error` is set, or neither for a score.

    `ttft` is the time in seconds from arrival to the first token, `inter_token` the gaps between later ones.
    """

    method: str
    path: ServingPath
    finish_reason: FinishReason | None
    error: Exception | None
    num_prompt_tokens: int
    num_generated_tokens: int
    timings: Timings
    ttft: float | None
    inter_token: tuple[float, ...]
    adapter: AdapterRef | None = None
    trace: Trace | None = None


class EngineObserver(Protocol):
    """Called on the engine thread, so it must be quick."""

    def step(self, record: StepRecord) -> None: ...

    def finished(self, record: RequestRecord) -> None: ...


class GuardedObserver:
    """Passes records on; what the observer raises is logged and does not reach the engine."""

    def __init__(self, observer: EngineObserver) -> None:
        self._observer = observer

    def step(self, record: StepRecord) -> None:
        try:
            self._observer.step(record)
        except Exception:
            _log.exception("observer_failed")

    def finished(self, record: RequestRecord) -> None:
        try:
            self._observer.finished(record)
        except Exception:
            _log.exception("observer_failed")


class SeveralObservers:
    """Passes records on to each, whatever the others raise."""

    def __init__(self, *observers: EngineObserver) -> None:
        self._observers = [GuardedObserver(observer) for observer in observers]

    def step(self, record: StepRecord) -> None:
        for observer in self._observers:
            observer.step(record)

    def finished(self, record: RequestRecord) -> None:
        for observer in self._observers:
            observer.finished(record)


class NullObserver:
    """Measures nothing."""

    def step(self, record: StepRecord) -> None: ...

    def finished(self, record: RequestRecord) -> None: ...
