"""A scheduler with a runner that only counts, over adapters without tensors."""

from collections import Counter
from typing import Any

import torch
from hotswap_server.adapters.slots import PATIENCE, Resident, Slots, State
from hotswap_server.core import AdapterRef, GenerateRequest, SamplingParams, ScoreRequest
from hotswap_server.engine.attention import AttentionSite
from hotswap_server.engine.fairness import FairnessOptions
from hotswap_server.engine.kv_cache import PagedKVCache
from hotswap_server.engine.prefixes import Prefix, PrefixPages
from hotswap_server.engine.scheduler import Plan, Scheduler
from hotswap_server.engine.sequence import Sequence
from hotswap_server.errors import AdapterInvalidError, HotswapError

PAGE = 4


def ref(name: str, tenant: str = "acme") -> AdapterRef:
    return AdapterRef(f"{tenant}/{name}", 1, name if tenant == "acme" else f"{name} of {tenant}", "lora")


PREFIXES = {
    name: Prefix(name, *((torch.rand(1, tokens, 1),) for _ in range(2)))
    for name, tokens in {"short": 3, "page": PAGE, "long": 2 * PAGE + 1}.items()
}


class FakeAdapters:
    """`num_slots` slots, loads that take `load_steps` steps, and adapters called `bad…` that fail to load.

    Who gets a slot and who makes room is the real policy; only the tensors are missing. `placed` are
    the prefixes of those that have one.
    """

    def __init__(self, num_slots: int = 2, load_steps: int = 0) -> None:
        self.load_steps = load_steps
        self.slots = Slots(num_slots)
        self.residents: dict[AdapterRef, Resident] = {}
        self.left: dict[AdapterRef, int] = {}  # steps until it is read
        self.users: Counter[AdapterRef] = Counter()
        self.loads: list[AdapterRef] = []
        self.expected: Counter[AdapterRef] = Counter()
        self.placed: dict[tuple[str, int], Prefix] = {}
        self.changes: dict[AdapterRef, HotswapError | None] = {}
        self.clock = 0

    def expect(self, ref: AdapterRef) -> None:
        self.expected[ref] += 1
        if ref not in self.residents:
            self.bring(ref)

    def bring(self, ref: AdapterRef) -> None:
        self.residents[ref] = Resident(ref, State.FETCHING)
        self.loads.append(ref)
        self.left[ref] = self.load_steps
        if not self.load_steps:
            self.arrive(ref)

    def arrive(self, ref: AdapterRef) -> None:
        del self.left[ref]
        resident = self.residents[ref]
        if ref.digest.startswith("bad"):
            resident.state, resident.error = State.FAILED, AdapterInvalidError(f"{ref} is bad")
            self.changes[ref] = resident.error
            return
        resident.state = State.WAITING
        self.slots.line[ref] = resident
        self.changes[ref] = None
        self.advance()

    def advance(self) -> None:
        while self.slots.line:
            first = next(iter(self.slots.line.values()))
            if self.slots.take(first):
                del self.slots.line[first.ref]
                first.state = State.READY
                self.touch(first)
                self.changes[first.ref] = None
                if prefix := PREFIXES.get(first.ref.digest):
                    self.placed["lora", first.slot] = prefix
                continue
            victim = self.slots.least_recent(lambda ref: self.expected[ref] > 0) or self.slots.make_way()
            if victim is None:
                return
            self.leave(victim)
        self.slots.make_way()

    def leave(self, resident: Resident) -> None:
        del self.residents[resident.ref]
        self.placed.pop(("lora", resident.slot), None)
        self.slots.give_back(resident)
        if self.expected[resident.ref]:
            self.bring(resident.ref)

    def touch(self, resident: Resident) -> None:
        self.clock += 1
        resident.last_used = self.clock

    def forget(self, ref: AdapterRef) -> None:
        assert self.expected[ref] > 0, "forgotten once too often"
        self.expected[ref] -= 1
        resident = self.residents[ref]
        if not self.expected[ref] and resident.state in (State.WAITING, State.FAILED):
            self.slots.line.pop(ref, None)
            del self.residents[ref]

    def prefer(self, ref: AdapterRef) -> bool:
        assert self.expected[ref] > 0
        return self.slots.prefer(ref)

    def take_changes(self) -> dict[AdapterRef, HotswapError | None]:
        changes = self.changes | dict.fromkeys(self.slots.reopened)
        self.changes = {}
        self.slots.reopened.clear()
        return changes

    def try_acquire(self, ref: AdapterRef) -> int | None:
        assert self.expected[ref] > 0, "asked for without being expected"
        resident = self.residents[ref]
        if resident.error:
            raise resident.error
        if resident.state is State.READY and not resident.yielding:
            self.users[ref] += 1
            self.expected[ref] -= 1
            resident.users += 1
            resident.used = True
            self.touch(resident)
            return resident.slot
        if resident.state is State.WAITING:
            resident.asked += 1
            if resident.asked % PATIENCE == 0:
                self.advance()
        return None

    def tick(self) -> None:
        """A step is over."""
        for ref in list(self.left):
            self.left[ref] -= 1
            if not self.left[ref]:
                self.arrive(ref)

    def release(self, ref: AdapterRef) -> None:
        assert self.users[ref] > 0, "released once too often"
        self.users[ref] -= 1
        resident = self.residents[ref]
        resident.users -= 1
        if not resident.users:
            if resident.yielding:
                self.leave(resident)
            self.advance()


class Simulation:
    """Steps of a scheduler whose runner computes what it is given at once."""

    def __init__(
        self,
        *,
        pages: int,
        batch_size: int = 8,
        batch_tokens: int = 16,
        adapters: FakeAdapters | None = None,
        **fairness: Any,
    ) -> None:
        self.cache = PagedKVCache(
            (AttentionSite(0, 1, 1, 1),),
            num_pages=pages,
            page_size=PAGE,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.adapters = adapters or FakeAdapters()
        self.prefixes = PrefixPages(self.cache, self.adapters.placed)
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.scheduler = Scheduler(
            self.cache,
            self.adapters,
            self.prefixes,
            max_batch_size=batch_size,
            max_batch_tokens=batch_tokens,
            max_context=pages * PAGE,
            fairness=FairnessOptions(**fairness),
        )
        self.alive: list[Sequence] = []
        self.failed: list[tuple[Sequence, HotswapError]] = []
        self.order_ended: list[Sequence] = []

    def add(
        self, prompt: int, new: int, adapter: str | None = None, *, score: bool = False, tenant: str = "acme"
    ) -> Sequence:
        """A request whose tokens fit the cache, as the engine sees to."""
        ids, held = tuple(range(prompt)), None if adapter is None else ref(adapter, tenant)
        request = (
            ScoreRequest(str(len(self.alive)), ids, adapter=held, tenant=tenant)
            if score
            else GenerateRequest(
                str(len(self.alive)), ids, SamplingParams(max_new_tokens=new), held, tenant=tenant
            )
        )
        sequence = Sequence(request, lambda event: None, max_new_tokens=new)
        self.alive.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.alive.remove(sequence)
        self.order_ended.append(sequence)

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        self.fail(plan)
        self.check(plan)
        self.compute(plan)
        return plan

    def step_unchecked(self) -> None:
        """For queues that are too long to be looked through."""
        plan = self.scheduler.schedule()
        self.fail(plan)
        self.compute(plan)

    def fail(self, plan: Plan) -> None:
        for sequence, error in plan.failed:
            self.failed.append((sequence, error))
            self.end(sequence)

    def compute(self, plan: Plan) -> None:
        for entry in plan.batch:
            sequence = entry.sequence
            sequence.num_computed += entry.num_new
            if sequence.num_uncomputed == 0:
                if not sequence.is_score:
                    sequence.token_ids.append(0)
                if sequence.is_score or sequence.num_generated >= sequence.max_new_tokens:
                    self.end(sequence)
        self.adapters.tick()

    def check(self, plan: Plan) -> None:
        running = self.scheduler.running
        waiting = [sequence for sequence in self.alive if sequence in self.scheduler.waiting]
        assert len(waiting) == len(self.scheduler.waiting)
        entries = [entry.sequence for entry in plan.batch]
        assert len(set(map(id, entries))) == len(entries)
        assert all(sequence in running for sequence in entries)
        assert Counter(map(id, running + waiting)) == Counter(map(id, self.alive))
        assert len(entries) <= len(running) <= self.batch_size
        assert sum(entry.num_new for entry in plan.batch) <= self.batch_tokens
        assert all(1 <= entry.num_new <= entry.sequence.num_uncomputed for entry in plan.batch)
        single = [entry.num_new == 1 for entry in plan.batch]
        assert single == sorted(single, reverse=True), "single tokens first"
        assert running == sorted(running, key=lambda sequence: sequence.arrived)
        assert bool(entries) == bool(running), "whenever something runs, a step makes progress"
        held = [page for s in self.alive for page in s.pages[s.num_prefix_tokens // PAGE :]]
        shared = {page for s in self.alive for page in s.pages[: s.num_prefix_tokens // PAGE]}
        assert len(held) == len(set(held)) == self.cache.pages.num_used - self.prefixes.num_pages
        assert shared.isdisjoint(held)
        assert len(shared) <= self.prefixes.num_pages
        for entry in plan.batch:
            prefix = entry.sequence.num_prefix_tokens
            needed = self.cache.pages_for(prefix + entry.sequence.num_computed + entry.num_new)
            assert len(entry.sequence.pages) == needed
            self.check_prefix(entry.sequence)
            adapter = entry.sequence.request.adapter
            assert (entry.sequence.slot is None) is (adapter is None)
        for sequence in waiting:
            assert not sequence.pages
            assert sequence.num_computed == 0
        users = Counter(s.request.adapter for s in self.alive if s.slot is not None)
        assert users == +self.adapters.users
        expected = Counter(s.request.adapter for s in self.alive if s.slot is None and s.request.adapter)
        assert expected == +self.adapters.expected

    def check_prefix(self, sequence: Sequence) -> None:
        """The first positions of its pages hold the prefix of its adapter."""
        adapter, count = sequence.request.adapter, sequence.num_prefix_tokens
        expected = None if adapter is None else PREFIXES.get(adapter.digest)
        assert sequence.prefix is expected
        if expected is not None:
            for cache, given in ((self.cache.keys, expected.keys), (self.cache.values, expected.values)):
                assert torch.equal(cache[0][sequence.pages].flatten(0, 2)[:count], given[0][0])
        if sequence.num_computed == 0 and not sequence.is_score:
            # What the runner will write: were a page of it shared, a neighbour's check would fail.
            for page in sequence.pages[count // PAGE :]:
                self.cache.keys[0][
                    page, :, count % PAGE if page == sequence.pages[count // PAGE] else 0 :
                ] = -1

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.alive:
                break
            self.step()
        assert not self.alive, "everything ends"
        assert self.cache.pages.num_used == self.prefixes.num_pages
        assert self.prefixes.make_room(self.cache.pages.num_pages), "idle prefixes give their pages back"
        assert self.cache.pages.num_used == self.prefixes.num_pages == 0
        assert not +self.adapters.users
        assert not +self.adapters.expected
