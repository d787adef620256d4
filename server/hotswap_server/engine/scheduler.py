"""Which sequences run in the next step, and how many tokens of each."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hotswap_server.engine.admission import fit_prefix
from hotswap_server.engine.fairness import FairnessOptions
from hotswap_server.engine.kv_cache import PagedKVCache
from hotswap_server.engine.lanes import Lane, Tenant
from hotswap_server.engine.prefixes import PrefixPages
from hotswap_server.engine.sequence import Sequence, Stage
from hotswap_server.engine.slots import AdapterResidency, SlotKeeper
from hotswap_server.engine.waiting import WaitingQueue
from hotswap_server.errors import HotswapError


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


@dataclass(slots=True)
class _Draft:
    """A step that is being planned."""

    budget: int
    batch: list[Scheduled] = field(default_factory=list)
    failed: list[tuple[Sequence, HotswapError]] = field(default_factory=list)
    full: bool = False  # whoever is first waits for a place or for pages, and nobody overtakes


class Scheduler:
    """Continuous batching: every step decodes all that run, then fills the token budget with prompts.

    Prompts are cut to the budget (chunked prefill) and come in the fair order of their tenants, whether they
    have begun or wait. When pages run out, the most served tenant's latest sequence gives its pages back and
    is computed anew later (Kwon et al., 2023). A tenant of which nothing runs does not wait for a place or
    pages while another, no less served, runs two or more: one of those gives way. The oldest that runs is
    never preempted for another, so that something always ends.
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
        fairness: FairnessOptions | None = None,
    ) -> None:
        self._cache = cache
        self._prefixes = prefixes
        self._max_context = max_context
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self.waiting = WaitingQueue(fairness)
        self._slots = SlotKeeper(adapters, self.waiting, prefixes)
        self.running: list[Sequence] = []  # the oldest first
        self.num_preemptions = 0
        self.too_late: Callable[[Sequence], HotswapError | None] = lambda sequence: None
        """Why there is no use in beginning a request any more."""

    def expect(self, sequence: Sequence) -> None:
        """Have its adapter brought while a step runs, before `add`, which must follow. On any thread."""
        self._slots.expect(sequence)

    def add(self, sequence: Sequence) -> None:
        self._slots.expect(sequence)
        self.waiting.add(sequence)

    def schedule(self) -> Plan:
        self._prefixes.forget_left()
        draft = _Draft(self._max_batch_tokens)
        for lane, error in self._slots.poll():
            self._fail_lane(lane, error, draft)
        for sequence in list(self.running):
            if sequence.has_last_pending:
                continue
            if draft.budget and sequence.num_uncomputed == 1 and sequence not in self.waiting:
                self._extend(sequence, draft)
        self._fill(draft)
        for entry in draft.batch:
            if not entry.sequence.is_score and entry.num_new == entry.sequence.num_uncomputed:
                account = self.waiting.tenants[entry.sequence.tenant].account
                self.waiting.counter.charge(account, output_tokens=1)
        batch = draft.batch
        batch.sort(key=lambda entry: (entry.num_new > 1, entry.sequence.method, entry.sequence.slot or 0))
        return Plan(batch, draft.failed)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that ended, wherever it is, and give back its pages and slot."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif (index := self._index(sequence)) is not None:
            del self.running[index]
            self.waiting.finish(sequence)
        self._cache.pages.release(sequence.pages)
        sequence.pages = []
        self._slots.release(sequence)

    def _fill(self, draft: _Draft) -> None:
        """Give what is left of the budget to prompts, the least served tenant's first."""
        begun = deque(
            sorted(
                (sequence for sequence in self.running if sequence.num_uncomputed > 1),
                key=lambda sequence: (self._claim(sequence), sequence.order),
            )
        )
        while draft.budget:
            lane = None if draft.full else self.waiting.first()
            if begun and (lane is None or self._goes_on(begun[0], lane)):
                sequence = begun.popleft()
                if sequence not in self.waiting:
                    self._extend(sequence, draft)
            elif lane is not None:
                self._admit_first(lane, draft)
            else:
                break

    def _extend(self, sequence: Sequence, draft: _Draft) -> None:
        """Plan the next tokens of a sequence that runs."""
        num_new = min(sequence.num_uncomputed, draft.budget)
        if self._reserve(sequence, num_new, draft):
            draft.batch.append(Scheduled(sequence, num_new))
            draft.budget -= num_new

    def _reserve(self, sequence: Sequence, num_new: int, draft: _Draft) -> bool:
        """Make room for `num_new` more tokens, at the expense of other sequences or of this one itself."""
        reached = sequence.num_prefix_tokens + sequence.num_computed + num_new
        missing = self._cache.pages_for(reached) - len(sequence.pages)
        while missing > 0:
            self._prefixes.make_room(missing)
            pages = self._cache.pages.allocate(missing)
            if pages is not None:
                sequence.pages.extend(pages)
                return True
            victim = max(
                self.running[1:] or self.running, key=lambda other: (self._service(other), other.order)
            )
            self._preempt(victim, draft)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, draft: _Draft) -> None:
        self.running.remove(sequence)
        for entry in draft.batch:
            if entry.sequence is sequence:
                draft.budget += entry.num_new
                draft.batch.remove(entry)
                break
        self._cache.pages.release(sequence.pages)
        sequence.pages = []
        sequence.num_computed = 0
        sequence.scored.clear()
        sequence.enter(Stage.QUEUED)
        self.waiting.put_back(sequence)
        self.num_preemptions += 1

    def _admit_first(self, lane: Lane, draft: _Draft) -> None:
        """Begin the first request of `lane`, or see to it that the next call looks at another one."""
        places = len(self.running) + 1 - self._max_batch_size
        if places > 0 and self._giving_way(lane.tenant, places, 0) is None:
            draft.full = True
            return
        try:
            if not self._slots.acquire(lane):
                return
        except HotswapError as error:
            self._fail_lane(lane, error, draft)
            return
        sequence = self.waiting.head(lane)
        try:
            if (late := self.too_late(sequence)) is not None:
                raise late
            if sequence.prefix is not None:
                fit_prefix(sequence, self._max_context)
        except HotswapError as error:
            self.waiting.remove(sequence)
            draft.failed.append((sequence, error))
            return
        victims = self._giving_way(lane.tenant, places, self._missing_pages(sequence))
        if victims is None:
            draft.full = True
            return
        for victim in victims:
            self._preempt(victim, draft)
        num_new = min(sequence.num_uncomputed, draft.budget)
        self._take_pages(sequence, num_new)
        sequence.admit(self.waiting.start(sequence))
        bisect.insort(self.running, sequence, key=lambda other: other.order)
        draft.batch.append(Scheduled(sequence, num_new))
        draft.budget -= num_new

    def _giving_way(self, tenant: Tenant, places: int, pages: int) -> list[Sequence] | None:
        """Whom to preempt for as many places and pages; None if the next request of `tenant` has to wait."""
        if places <= 0 and pages <= 0:
            return []
        if tenant.num_running:
            return None
        youngest: dict[Tenant, list[Sequence]] = {}
        for sequence in self.running[1:]:
            other = self.waiting.tenants[sequence.tenant]
            if other.account.service >= tenant.account.service:
                youngest.setdefault(other, []).append(sequence)
        counts = {other: other.num_running for other in youngest}
        victims: list[Sequence] = []
        while places > 0 or pages > 0:
            givers = [other for other in youngest if counts[other] > 1 and youngest[other]]
            if not givers:
                return None
            giver = max(givers, key=lambda other: counts[other] / other.account.weight)
            victim = youngest[giver].pop()
            counts[giver] -= 1
            victims.append(victim)
            places -= 1
            pages -= len(victim.pages) - victim.num_prefix_tokens // self._cache.page_size
        return victims

    def _pages_needed(self, sequence: Sequence) -> int:
        """For the adapter's prefix and all tokens there are so far: fewer, and it is preempted at once."""
        prefix, pages_for = sequence.prefix, self._cache.pages_for
        shared = sequence.num_prefix_tokens // self._cache.page_size
        needed = pages_for(sequence.num_prefix_tokens + sequence.num_tokens) - shared
        # With others running a page more, for the same reason.
        return needed + (1 if self.running else 0) + (self._prefixes.num_missing(prefix) if prefix else 0)

    def _missing_pages(self, sequence: Sequence) -> int:
        needed = self._pages_needed(sequence)
        self._prefixes.make_room(needed, keep=sequence.prefix)
        return needed - self._cache.pages.num_free

    def _take_pages(self, sequence: Sequence, num_new: int) -> None:
        """Pages for the adapter's prefix and the first `num_new` tokens."""
        prefix, pages_for = sequence.prefix, self._cache.pages_for
        shared = sequence.num_prefix_tokens // self._cache.page_size
        if prefix is not None:
            sequence.pages = self._prefixes.share(prefix)
        own = self._cache.pages.allocate(pages_for(sequence.num_prefix_tokens + num_new) - shared)
        if own is None:
            raise RuntimeError("fewer pages are free than were counted")
        sequence.pages += own
        if prefix is not None:
            self._prefixes.write_rest(prefix, own[0])

    def _fail_lane(self, lane: Lane, error: HotswapError, draft: _Draft) -> None:
        """All that waited for a load share its failure, or each would wait for one of its own."""
        for sequence in self.waiting.sequences(lane):
            self.waiting.remove(sequence)
            draft.failed.append((sequence, error))

    def _goes_on(self, begun: Sequence, lane: Lane) -> bool:
        """Whether a prompt that has begun comes before the first request of `lane`."""
        claim, service = self._claim(begun), lane.tenant.account.service
        return claim < service or (claim == service and lane.tenant.num_running > 0)

    def _claim(self, begun: Sequence) -> float:
        """The place of a prompt that has begun; a tenant's only one is not set back by its own charge."""
        tenant = self.waiting.tenants[begun.tenant]
        alone = tenant.num_running == 1 and tenant.num_waiting == 0
        return begun.service_before if alone else tenant.account.service

    def _service(self, sequence: Sequence) -> float:
        return self.waiting.tenants[sequence.tenant].account.service

    def _index(self, sequence: Sequence) -> int | None:
        index = bisect.bisect_left(self.running, sequence.order, key=lambda other: other.order)
        found = index < len(self.running) and self.running[index] is sequence
        return index if found else None
