"""An engine over a store of adapters, for tests: submits requests and collects their events."""

import itertools
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.merges import Merges
from hotswap_server.adapters.method import BankOptions
from hotswap_server.adapters.residency import LoadRecord, Residency
from hotswap_server.core import (
    AdapterRef,
    Delta,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    SamplingParams,
    Scored,
    ScoreRequest,
    TokenLogprob,
)
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.engine import Engine, EngineOptions
from hotswap_server.engine.kv_cache import PagedKVCache
from hotswap_server.engine.observer import RequestRecord, StepRecord
from hotswap_server.metrics import Metrics

SOON_S = 60.0
_ids = itertools.count()


@dataclass
class Outcome:
    """What one request has given so far."""

    request: GenerateRequest | ScoreRequest
    events: list[Event] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # when each came, by time.monotonic()
    _ended: threading.Event = field(default_factory=threading.Event)

    def sink(self, event: Event) -> None:
        assert not self._ended.is_set(), f"{event} after the last event"
        self.times.append(time.monotonic())
        self.events.append(event)
        if not isinstance(event, Delta):
            self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> "Outcome":
        assert self._ended.wait(SOON_S), f"no end of {self.request.id} after {len(self.events)} events"
        return self

    def result(self) -> "Outcome":
        """Wait, and raise what the request failed with."""
        last = self.wait().events[-1]
        if isinstance(last, Failed):
            raise last.error
        return self

    @property
    def error(self) -> Exception | None:
        last = self.wait().events[-1]
        return last.error if isinstance(last, Failed) else None

    @property
    def deltas(self) -> list[Delta]:
        return [event for event in self.events if isinstance(event, Delta)]

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for delta in self.deltas for entry in delta.logprobs]

    @property
    def finished(self) -> Finished:
        [event] = [event for event in self.result().events if isinstance(event, Finished)]
        return event

    @property
    def scored(self) -> Scored:
        [event] = self.result().events
        assert isinstance(event, Scored)
        return event


class Recorder:
    """Observes engine and manager: counts, and calls what is due after a step."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.requests: list[RequestRecord] = []
        self.adapter_events: list[tuple[str, AdapterRef]] = []
        self.loads: list[LoadRecord] = []
        self.after_step: defaultdict[int, list[Callable[[], None]]] = defaultdict(list)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)
        for action in self.after_step.pop(len(self.steps), []):
            action()

    def finished(self, record: RequestRecord) -> None:
        self.requests.append(record)

    def loaded(self, record: LoadRecord) -> None:
        self.loads.append(record)
        self.adapter_events.append(("loaded", record.ref))

    def retried(self, ref: AdapterRef, error: Exception) -> None:
        self.adapter_events.append(("retried", ref))

    def evicted(self, ref: AdapterRef, tier: Residency) -> None:
        self.adapter_events.append(("evicted" if tier is Residency.DEVICE else "evicted_from_host", ref))

    def failed(self, ref: AdapterRef, error: Exception) -> None:
        self.adapter_events.append(("failed", ref))

    def merged(self, ref: AdapterRef, seconds: float) -> None:
        self.adapter_events.append(("merged", ref))

    def unmerged(self, ref: AdapterRef) -> None:
        self.adapter_events.append(("unmerged", ref))

    def count(self, kind: str) -> int:
        return sum(event == kind for event, _ in self.adapter_events)


class Running:
    """A started engine with its manager; leaving the `with` block asserts that nothing has leaked."""

    def __init__(
        self,
        base: BaseModel,
        tokenizer: Any,
        store: Path | str,
        *,
        kv_pages: int = 256,
        page_size: int = 16,
        slots: int = 8,
        max_rank: int = 64,
        manager: dict[str, Any] | None = None,
        observer: Metrics | None = None,
        **options: Any,
    ) -> None:
        page_bytes = PagedKVCache.bytes_per_page(base.attention, page_size, base.dtype)
        self.recorder = Recorder()
        self.adapters = AdapterManager(
            AdapterManager.open_store(str(store)),
            base,
            BankOptions(slots, max_lora_rank=max_rank, max_prefix_tokens=base.max_context),
            observer=observer or self.recorder,
            **(manager or {}),
        )
        self.engine = Engine(
            base,
            tokenizer,
            self.adapters,
            EngineOptions(kv_cache_bytes=kv_pages * page_bytes, page_size=page_size, **options),
            quarantine=self.adapters.quarantine,
            observer=observer or self.recorder,
        )
        self.merges = Merges(self.adapters, base, self.engine.between_steps, observer=self.recorder)
        self.adapters.on_change = self.engine.wake
        self.adapters.cancel_users = self.engine.cancel_adapter

    def __enter__(self) -> "Running":
        self.engine.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.assert_clean()
        finally:
            self.engine.stop()
            self.merges.close()
            self.adapters.close()
        if error is None:
            self.assert_clean()

    def assert_clean(self) -> None:
        """Wait until the engine is idle; then nothing may be held but what prefixes share."""
        wait_until(lambda: self.engine.idle)
        stats = self.engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.kv_pages_used == stats.kv_pages_prefixes
        assert self.adapters.users() == 0

    def ref(self, adapter: str | None) -> AdapterRef | None:
        return None if adapter is None else self.adapters.resolve(adapter, None)

    def generate(
        self, prompt: Iterable[int], adapter: str | AdapterRef | None = None, **sampling: Any
    ) -> Outcome:
        """Submit a request, greedy unless told; give its outcome at once."""
        params = SamplingParams(**({"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True} | sampling))
        ref = adapter if isinstance(adapter, AdapterRef) else self.ref(adapter)
        return self.submit(GenerateRequest(f"request-{next(_ids)}", tuple(prompt), params, ref))

    def merge(self, name: str, version: int | None = None) -> AdapterRef:
        """Merge a version, and wait until it is."""
        return self.merges.merge(self.adapters.resolve(name, version)).result(SOON_S).info.ref

    def unmerge(self, name: str) -> AdapterRef:
        return self.merges.unmerge(name).result(SOON_S).info.ref

    def score(self, tokens: Iterable[int], adapter: str | None = None, **options: Any) -> Outcome:
        return self.submit(
            ScoreRequest(f"request-{next(_ids)}", tuple(tokens), adapter=self.ref(adapter), **options)
        )

    def submit(self, request: GenerateRequest | ScoreRequest) -> Outcome:
        outcome = Outcome(request)
        self.engine.submit(request, outcome.sink)
        return outcome

    def arrive(self, arrivals: Iterable[Callable[[], Outcome]], *, every: int) -> list[Outcome]:
        """Submit one after another, each `every` steps after the last or when the engine is idle."""
        pending, outcomes = deque(arrivals), list[Outcome]()
        lock = threading.Lock()

        def next_one() -> None:
            with lock:
                if pending:
                    outcomes.append(pending.popleft()())

        def again() -> None:
            next_one()
            if pending:
                self.recorder.after_step[len(self.recorder.steps) + every].append(again)

        again()
        while pending:
            if self.engine.idle:
                next_one()
            time.sleep(0.001)
        with lock:
            return [outcome.result() for outcome in outcomes]

    def cancel(self, outcome: Outcome) -> None:
        self.engine.cancel(outcome.request.id)


def wait_until(condition: Callable[[], bool], within: float = SOON_S) -> None:
    until = time.monotonic() + within
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.001)
