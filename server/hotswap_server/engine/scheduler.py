"""Which sequences run in the next step, and how many tokens of each."""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from hotswap_server.core import AdapterRef
from hotswap_server.engine.admission import fit_prefix
from hotswap_server.engine.kv_cache import PagedKVCache
from hotswap_server.engine.prefixes import PrefixPages
from hotswap_server.engine.sequence import Sequence, Stage
from hotswap_server.errors import HotswapError


class AdapterResidency(Protocol):
    """Where the scheduler gets slots from; never waits.

    Each request is told of once by `expect`, which a successful `try_acquire` or a `forget` ends.
    """

    def expect(self, ref: AdapterRef) -> None:
        """A request will ask for `ref`: have it brought, and do not let it be evicted before that."""
        ...

    def try_acquire(self, ref: AdapterRef) -> int | None:
        """A slot that holds `ref`, kept until `release`; None while it is not there.

        Those that are waited for get slots in turn: an adapter that others keep using makes room in the end.

        Raises:
            HotswapError: it cannot be loaded.
        """
        ...

    def forget(self, ref: AdapterRef) -> None:
        """A request that `expect` told of has ended without a slot."""
        ...

    def release(self, ref: AdapterRef) -> None: ...


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The next `num_new` uncomputed tokens of a sequence."""

    sequence: Sequence
    num_new: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step, single tokens first, and the sequences that ended before they could run."""

    batch: list[Scheduled]
    failed: list[tuple[Sequence, HotswapError]]


class Scheduler:
    """Continuous batching: every step decodes all that run, then fills the token budget with prompts.

    Prompts are cut to the budget (chunked prefill). When pages run out, the sequence that arrived last gives
    its pages back and is computed anew later (Kwon et al., 2023).
    """

    def __init__(
        self,
        cache: PagedKVCache,
        adapters: AdapterResidency,
        prefixes: PrefixPages,
        *,
        max_batch_size: int,
        max_batch_tokens: int,
        max_context: int,
    ) -> None:
        self._cache = cache
        self._adapters = adapters
        self._prefixes = prefixes
        self._max_context = max_context
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        if sequence.request.adapter is not None:
            self._adapters.expect(sequence.request.adapter)
        self.waiting.append(sequence)

    def schedule(self) -> Plan:
        self._prefixes.forget_left()
        budget = self._max_batch_tokens
        batch: list[Scheduled] = []
        # Decodes come before prompts, the oldest first, so that a preemption hits the youngest.
        for decoding in (True, False):
            for sequence in list(self.running):
                if budget == 0:
                    break
                if sequence not in self.running or (sequence.num_uncomputed == 1) is not decoding:
                    continue
                num_new = min(sequence.num_uncomputed, budget)
                if self._reserve(sequence, num_new, batch):
                    batch.append(Scheduled(sequence, num_new))
                    budget -= num_new
        failed: list[tuple[Sequence, HotswapError]] = []
        self._admit(batch, budget, failed)
        batch.sort(key=lambda entry: (entry.num_new > 1, entry.sequence.method, entry.sequence.slot or 0))
        return Plan(batch, failed)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that ended, wherever it is, and give back its pages and slot."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._cache.pages.release(sequence.pages)
        sequence.pages = []
        adapter = sequence.request.adapter
        if adapter is not None:
            if sequence.slot is None:
                self._adapters.forget(adapter)
            else:
                self._adapters.release(adapter)
                sequence.slot = None

    def _reserve(self, sequence: Sequence, num_new: int, batch: list[Scheduled]) -> bool:
        """Make room for `num_new` more tokens, at the expense of younger sequences if need be."""
        reached = sequence.num_prefix_tokens + sequence.num_computed + num_new
        missing = self._cache.pages_for(reached) - len(sequence.pages)
        while missing > 0:
            self._prefixes.make_room(missing)
            pages = self._cache.pages.allocate(missing)
            if pages is not None:
                sequence.pages.extend(pages)
                return True
            victim = self.running[-1]
            self._preempt(victim, batch)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, batch: list[Scheduled]) -> None:
        self.running.remove(sequence)
        batch[:] = [entry for entry in batch if entry.sequence is not sequence]
        self._cache.pages.release(sequence.pages)
        sequence.pages = []
        sequence.num_computed = 0
        sequence.scored.clear()
        sequence.enter(Stage.QUEUED)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(
        self, batch: list[Scheduled], budget: int, failed: list[tuple[Sequence, HotswapError]]
    ) -> None:
        broken: dict[AdapterRef | None, HotswapError] = {}
        for sequence in list(self.waiting):
            if budget == 0 or len(self.running) >= self._max_batch_size:
                return
            try:
                # All that waited for a load share its failure, or each would wait for one of its own.
                if error := broken.get(sequence.request.adapter):
                    raise error
                ready = self._acquire_adapter(sequence)
            except HotswapError as error:
                broken[sequence.request.adapter] = error
                self.waiting.remove(sequence)
                failed.append((sequence, error))
                continue
            try:
                if sequence.prefix is not None:
                    fit_prefix(sequence, self._max_context)
            except HotswapError as error:
                self.waiting.remove(sequence)
                failed.append((sequence, error))
                continue
            if not ready:
                sequence.enter(Stage.LOADING)
                continue
            num_new = min(sequence.num_uncomputed, budget)
            if not self._take_pages(sequence, num_new):
                # Nobody overtakes: smaller requests would starve a large one.
                sequence.enter(Stage.QUEUED)
                return
            self.waiting.remove(sequence)
            bisect.insort(self.running, sequence, key=lambda other: other.arrived)
            sequence.enter(Stage.PREFILL)
            batch.append(Scheduled(sequence, num_new))
            budget -= num_new

    def _take_pages(self, sequence: Sequence, num_new: int) -> bool:
        """Pages for the adapter's prefix and the first `num_new` tokens, if all there are so far will fit."""
        prefix, pages_for = sequence.prefix, self._cache.pages_for
        shared = sequence.num_prefix_tokens // self._cache.page_size
        # The whole prompt must fit now, and with others running a page more, or it is preempted at once.
        needed = pages_for(sequence.num_prefix_tokens + sequence.num_tokens) - shared
        needed += (1 if self.running else 0) + (self._prefixes.num_missing(prefix) if prefix else 0)
        if not self._prefixes.make_room(needed, keep=prefix):
            return False
        if prefix is not None:
            sequence.pages = self._prefixes.share(prefix)
        own = self._cache.pages.allocate(pages_for(sequence.num_prefix_tokens + num_new) - shared)
        if own is None:
            raise RuntimeError("fewer pages are free than were counted")
        sequence.pages += own
        if prefix is not None:
            self._prefixes.write_rest(prefix, own[0])
        return True

    def _acquire_adapter(self, sequence: Sequence) -> bool:
        adapter = sequence.request.adapter
        if adapter is not None and sequence.slot is None:
            sequence.slot = self._adapters.try_acquire(adapter)
            if sequence.slot is None:
                return False
            sequence.prefix = self._prefixes.placed(sequence.method, sequence.slot)
        return True
