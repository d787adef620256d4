"""The engine: one thread that plans a step, runs it and hands out what it gave."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import structlog
import torch

from hotswap_server.adapters.quarantine import Quarantine
from hotswap_server.core import (
    AdapterRef,
    Event,
    GenerateRequest,
    SamplingParams,
    ScoreRequest,
)
from hotswap_server.engine.admission import admit
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.batch import BatchBuilder
from hotswap_server.engine.buffers import StepBuffers
from hotswap_server.engine.chores import Chores
from hotswap_server.engine.collector import Collector
from hotswap_server.engine.flight import Flights
from hotswap_server.engine.graphs import Progress, graph_sizes, ignore_progress, prompt_sizes, record_sizes
from hotswap_server.engine.health import EngineHealth, Watchdog
from hotswap_server.engine.kv_cache import PagedKVCache
from hotswap_server.engine.observer import EngineObserver, GuardedObserver, NullObserver, step_record
from hotswap_server.engine.options import EngineOptions as EngineOptions
from hotswap_server.engine.options import EngineStats as EngineStats
from hotswap_server.engine.overload import Displacement, Doorkeeper
from hotswap_server.engine.prefixes import PrefixPages
from hotswap_server.engine.runner import ModelRunner
from hotswap_server.engine.scheduler import Scheduled, Scheduler
from hotswap_server.engine.sequence import EventSink, Sequence, Stage
from hotswap_server.engine.slots import AdapterResidency
from hotswap_server.engine.step_timer import StepTimer
from hotswap_server.errors import (
    AdapterUnloadedError,
    DrainingError,
    EngineError,
    HotswapError,
    InvalidRequestError,
)

T = TypeVar("T")

_log = structlog.get_logger(__name__)

Post = Callable[[list[tuple[EventSink, Event]]], None]
"""Delivers the events of one step."""


def deliver(events: list[tuple[EventSink, Event]]) -> None:
    """Call every sink here and now."""
    for sink, event in events:
        sink(event)


class Engine:
    """Decodes requests of any adapter together. `submit` and `cancel` may be called from any thread."""

    def __init__(
        self,
        base: BaseModel,
        tokenizer: Any,
        adapters: AdapterResidency,
        options: EngineOptions | None = None,
        *,
        post: Post = deliver,
        quarantine: Quarantine | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        options = options or EngineOptions()
        page_bytes = PagedKVCache.bytes_per_page(base.attention, options.page_size, base.dtype)
        num_pages = options.kv_cache_bytes // page_bytes
        if num_pages < 1:
            raise InvalidRequestError("kv_cache_bytes", f"must hold at least one page of {page_bytes} bytes")
        self.base = base
        self.tokenizer = tokenizer
        self.options = options
        self.cache = PagedKVCache(
            base.attention,
            num_pages=num_pages,
            page_size=options.page_size,
            dtype=base.dtype,
            device=base.device,
        )
        asked = options.max_context or base.max_context
        self.max_context = min(asked, base.max_context, num_pages * options.page_size)
        """Tokens that one request may have, prompt and output together."""
        self._prefixes = PrefixPages(self.cache, base.prefixes)
        self._scheduler = Scheduler(
            self.cache,
            adapters,
            self._prefixes,
            max_batch_size=options.max_batch_size,
            max_batch_tokens=options.max_batch_tokens,
            max_context=self.max_context,
            fairness=options.fairness,
        )
        self._door = Doorkeeper(
            options.queue, self._scheduler.waiting, max_batch_tokens=options.max_batch_tokens
        )
        self._scheduler.too_late = self._door.too_late
        max_pages = self.cache.pages_for(self.max_context)
        self._buffers: StepBuffers | None = None
        if options.graphs and base.state.kernels.can_be_recorded:
            self._buffers = StepBuffers(
                max_sequences=options.max_batch_size,
                max_pages=max_pages,
                device=base.device,
                max_tokens=prompt_sizes(options.max_batch_tokens)[-1],
            )
        self._sizes = graph_sizes(options.max_batch_size)
        self._prompt_sizes = prompt_sizes(options.max_batch_tokens)
        self._builder = BatchBuilder(
            max_tokens=options.max_batch_tokens,
            max_sequences=options.max_batch_size,
            max_pages=max_pages,
            page_size=options.page_size,
            device=base.device,
            buffers=self._buffers,
            sizes=self._sizes,
            prompt_sizes=self._prompt_sizes,
        )
        self._runner = ModelRunner(
            base, self.cache, max_sequences=options.max_batch_size, buffers=self._buffers
        )
        self._post = post
        self._observer = GuardedObserver(observer) if observer else NullObserver()
        self._sequences: dict[str, Sequence] = {}
        self._known: set[str] = set()  # ids of the sequences and of those in the inbox
        # New ones, ids to cancel, adapters to leave, things to do.
        self._inbox: deque[Sequence | str | AdapterRef | Displacement | Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._draining = False
        self._stopping = False
        self._woken = False
        self.chores = Chores(self.wake)
        self._collector = Collector(base.eos_token_ids, self._end, self._observer)
        self._collector.on_poison = self._poisoned
        ahead = base.device.type == "cuda" if options.run_ahead is None else options.run_ahead
        self._flights = Flights(
            self._builder, self._runner, self._collector, base.merged, self._stepped, ahead=ahead
        )
        self.quarantine = Quarantine() if quarantine is None else quarantine
        self.health = EngineHealth()
        self._thread = threading.Thread(target=self._loop, name="hotswap-engine", daemon=True)
        self._watchdog = Watchdog(
            self.health, self._thread, step_timeout=options.step_timeout, probe=self._probe
        )

    def record_graphs(self, progress: Progress = ignore_progress) -> None:
        """Record the base's graphs, before `start`; those with adapters follow when first needed."""
        if self._runner.graphs is not None and self._buffers is not None:
            with torch.inference_mode():
                self._sizes[:] = record_sizes(
                    self._runner.graphs,
                    self._buffers,
                    self._sizes,
                    self._prompt_sizes,
                    progress,
                    limit=self.options.graph_timeout,
                )

    def start(self) -> None:
        self._thread.start()
        self._watchdog.start()

    def drain(self) -> None:
        """Refuse new requests from now on; those inside go on."""
        with self._changed:
            self._draining = True

    def stop(self) -> None:
        """End the thread. Requests that are still inside fail with `DrainingError`."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify()
        self._watchdog.stop()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """Something outside has changed, an adapter was loaded for one: plan again."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def submit(self, request: GenerateRequest | ScoreRequest, sink: EventSink) -> None:
        """Queue a request; its events go to `sink` through `post`.

        Raises:
            InvalidRequestError: see `admit`.
            OverloadedError: the queue is full.
            DeadlineTooShortError: it cannot be done before its deadline.
            AdapterQuarantinedError: its adapter is served no more.
            DrainingError: the engine takes no more requests.
        """
        sequence = admit(
            request, sink, self.tokenizer, max_context=self.max_context, vocab_size=self.base.vocab_size
        )
        if request.adapter is not None:
            self.quarantine.check(request.adapter)
        with self._changed:
            if self._draining:
                raise DrainingError("the server is shutting down; send the request to another one")
            if sequence.id in self._known:
                raise InvalidRequestError("id", f"{sequence.id} is the id of a request that runs already")
            displacement = self._door.enter(sequence)
            self._known.add(sequence.id)
            self._scheduler.expect(sequence)
            if displacement is not None:
                self._inbox.append(displacement)
            self._inbox.append(sequence)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """Forget a request at the next step; it gets no further event. Unknown ids are ignored."""
        with self._changed:
            self._inbox.append(request_id)
            self._changed.notify()

    def cancel_adapter(self, ref: AdapterRef) -> None:
        """Fail every request that uses `ref` at the next step, with `AdapterUnloadedError`."""
        with self._changed:
            self._inbox.append(ref)
            self._changed.notify()

    def between_steps(self, action: Callable[[], T]) -> Future[T]:
        """Do something quick on the engine's thread while no step runs; its result is the future's.

        Raises:
            DrainingError: the engine has stopped.
        """
        future: Future[T] = Future()

        def act() -> None:
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            if self._stopping:
                raise DrainingError("the server is shutting down")
            self._inbox.append(act)
            self._changed.notify()
        return future

    def run_ahead(self, wanted: bool) -> None:
        """Whether a step may be launched before the tokens of the last are read; see `EngineOptions`."""
        self._flights.ahead = wanted

    def step_timer(self) -> StepTimer:
        """Times steps of made-up sequences, as chores."""
        return StepTimer(
            self._builder,
            self._runner,
            self.cache,
            self._prefixes,
            max_context=self.max_context,
            device=self.base.device,
        )

    def stats(self) -> EngineStats:
        pages = self.cache.pages
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + len(self._inbox),
            kv_pages_used=pages.num_used,
            kv_pages_total=pages.num_pages,
            kv_pages_prefixes=self._prefixes.num_pages,
            preemptions=self._scheduler.num_preemptions,
            sound=self.health.sound,
            steps_failed=self.health.num_failed,
            steps_stuck=self.health.num_stuck,
            adapters_quarantined=self.quarantine.num_added,
        )

    def tenants(self) -> dict[str, tuple[int, int]]:
        """Requests that run and that wait, by tenant, of those that have any."""
        return {
            name: (tenant.num_running, tenant.num_waiting)
            for name, tenant in dict(self._scheduler.waiting.tenants).items()
        }

    @property
    def max_batch_size(self) -> int:
        return self.options.max_batch_size

    @property
    def idle(self) -> bool:
        return not self._sequences and not self._inbox

    def _loop(self) -> None:
        with torch.inference_mode():
            while True:
                self.health.began()
                try:
                    with self._changed:
                        self._woken = False
                        self._take_messages()
                        if self._stopping:
                            break
                    self._advance()
                    if chores := self.chores.waiting:
                        self._flights.settle()
                except Exception:
                    _log.exception("engine_failed", requests=len(self._sequences))
                    chores = self.chores.waiting
                    self._fail_all(EngineError("the engine failed; see the server's log"))
                    self._flights.abandon()
                self._flush()
                results = self._flights.take_results()
                self.health.ended(good=all(results) if results else None)
                busy = bool(results) or self._flights.underway
                busy |= chores and self.chores.run_one()
                if not busy:
                    with self._changed:
                        self._changed.wait_for(lambda: self._inbox or self._woken or self._stopping)
        self.chores.close()
        self._fail_all(DrainingError("the server shut down before the request was finished"))
        self._flush()

    def _advance(self) -> None:
        """Plan a step and launch it; see `Flights`."""
        plan = self._scheduler.schedule()
        for sequence, error in plan.failed:
            self._collector.fail(sequence, error)
        self._flights.advance(plan.batch)

    def _fail_all(self, error: EngineError | DrainingError) -> None:
        for sequence in list(self._sequences.values()):
            self._collector.fail(sequence, error)

    def _take_messages(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Sequence):
                self._sequences[message.id] = message
                self._scheduler.add(message)
            elif isinstance(message, Displacement):
                for sequence, error in self._door.displaced(message):
                    self._collector.fail(sequence, error)
            elif callable(message):
                self._flights.settle()
                message()
            elif isinstance(message, AdapterRef):
                for sequence in [s for s in self._sequences.values() if s.request.adapter == message]:
                    self._collector.fail(
                        sequence, AdapterUnloadedError(f"{message} was unloaded while the request ran")
                    )
            elif (gone := self._sequences.get(message)) is not None:
                self._collector.cancel(gone)
        self._door.entered()

    def _stepped(self, used: list[Scheduled], seconds: float) -> None:
        self._door.step(seconds, sum(entry.num_new for entry in used))
        self._observer.step(step_record(used, seconds, self.stats()))

    def _poisoned(self, ref: AdapterRef) -> None:
        """Serve an adapter no more, and its requests no further."""
        _log.error("adapter_quarantined", adapter=str(ref), digest=ref.digest)
        self.quarantine.add(ref)
        for sequence in list(self._sequences.values()):
            if sequence.request.adapter is not None and sequence.request.adapter.digest == ref.digest:
                self._collector.fail(sequence, self.quarantine.error(sequence.request.adapter))

    def _probe(self) -> None:
        """One token of the base, to see whether steps work again when nobody else asks."""
        if self.idle:
            with suppress(HotswapError):
                sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
                self.submit(GenerateRequest(f"probe-{secrets.token_hex(8)}", (0,), sampling), lambda _: None)

    def _end(self, sequence: Sequence) -> None:
        sequence.enter(Stage.DECODE)
        self._scheduler.remove(sequence)
        sequence.ended = True
        del self._sequences[sequence.id]
        self._known.discard(sequence.id)

    def _flush(self) -> None:
        if events := self._collector.take():
            self._post(events)
