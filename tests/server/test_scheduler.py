"""The scheduler against a runner that only counts: nothing leaks, limits hold, everything ends."""

import random
from collections import Counter

import pytest
import torch
from hotswap_server.core import AdapterRef, GenerateRequest, SamplingParams, ScoreRequest
from hotswap_server.engine.attention import AttentionSite
from hotswap_server.engine.kv_cache import PagedKVCache
from hotswap_server.engine.prefixes import Prefix, PrefixPages
from hotswap_server.engine.scheduler import Plan, Scheduler
from hotswap_server.engine.sequence import Sequence
from hotswap_server.errors import AdapterInvalidError, HotswapError, InvalidRequestError
from hypothesis import given, settings
from hypothesis import strategies as st

PAGE = 4


def ref(name: str) -> AdapterRef:
    return AdapterRef(f"acme/{name}", 1, name, "lora")


PREFIXES = {
    name: Prefix(name, *((torch.rand(1, tokens, 1),) for _ in range(2)))
    for name, tokens in {"short": 3, "page": PAGE, "long": 2 * PAGE + 1}.items()
}


class FakeAdapters:
    """`num_slots` slots, loads that take `load_steps` steps, and adapters called `bad…` that fail to load.

    `placed` are the prefixes of those that have one.
    """

    def __init__(self, num_slots: int = 2, load_steps: int = 0) -> None:
        self.num_slots = num_slots
        self.load_steps = load_steps
        self.left: dict[AdapterRef, int] = {}  # steps until it is loaded; has a slot
        self.users: Counter[AdapterRef] = Counter()
        self.loads: list[AdapterRef] = []
        self.expected: Counter[AdapterRef] = Counter()
        self.placed: dict[tuple[str, int], Prefix] = {}

    def expect(self, ref: AdapterRef) -> None:
        self.expected[ref] += 1

    def forget(self, ref: AdapterRef) -> None:
        assert self.expected[ref] > 0, "forgotten once too often"
        self.expected[ref] -= 1

    def try_acquire(self, ref: AdapterRef) -> int | None:
        assert self.expected[ref] > 0, "asked for without being expected"
        if ref not in self.left:
            if len(self.left) == self.num_slots:
                idle = [held for held in self.left if not self.users[held] and self.left[held] == 0]
                if not idle:
                    return None
                del self.left[idle[0]]
            self.left[ref] = self.load_steps
            self.loads.append(ref)
        if self.left[ref]:
            return None
        if ref.digest.startswith("bad"):
            del self.left[ref]
            raise AdapterInvalidError(f"{ref} is bad")
        self.users[ref] += 1
        self.expected[ref] -= 1
        self.placed.clear()
        for slot, held in enumerate(self.left):
            if held.digest in PREFIXES:
                self.placed["lora", slot] = PREFIXES[held.digest]
        return list(self.left).index(ref)

    def tick(self) -> None:
        self.left = {ref: max(0, steps - 1) for ref, steps in self.left.items()}

    def release(self, ref: AdapterRef) -> None:
        assert self.users[ref] > 0, "released once too often"
        self.users[ref] -= 1


class Simulation:
    """Steps of a scheduler whose runner computes what it is given at once."""

    def __init__(
        self, *, pages: int, batch_size: int = 8, batch_tokens: int = 16, adapters: FakeAdapters | None = None
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
        )
        self.alive: list[Sequence] = []
        self.failed: list[tuple[Sequence, HotswapError]] = []
        self.order_ended: list[Sequence] = []

    def add(self, prompt: int, new: int, adapter: str | None = None, *, score: bool = False) -> Sequence:
        """A request whose tokens fit the cache, as the engine sees to."""
        ids, held = tuple(range(prompt)), None if adapter is None else ref(adapter)
        request = (
            ScoreRequest(str(len(self.alive)), ids, adapter=held)
            if score
            else GenerateRequest(str(len(self.alive)), ids, SamplingParams(max_new_tokens=new), held)
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
        for sequence, error in plan.failed:
            self.failed.append((sequence, error))
            self.end(sequence)
        self.check(plan)
        for entry in plan.batch:
            sequence = entry.sequence
            sequence.num_computed += entry.num_new
            if sequence.num_uncomputed == 0:
                if not sequence.is_score:
                    sequence.token_ids.append(0)
                if sequence.is_score or sequence.num_generated >= sequence.max_new_tokens:
                    self.end(sequence)
        self.adapters.tick()
        return plan

    def check(self, plan: Plan) -> None:
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
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


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pages=st.integers(4, 20),
    batch_size=st.integers(1, 6),
    batch_tokens=st.integers(1, 24),
    num_slots=st.integers(1, 3),
    load_steps=st.integers(0, 4),
)
def test_random_traffic(seed, pages, batch_size, batch_tokens, num_slots, load_steps):
    rng = random.Random(seed)
    simulation = Simulation(
        pages=pages,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        adapters=FakeAdapters(num_slots, load_steps),
    )
    context = pages * PAGE
    for _ in range(60):
        for _ in range(rng.choice([0, 0, 1, 3])):
            prompt = rng.randint(1, context - 1)
            new = rng.randint(1, context - prompt)
            adapter = rng.choice([None, "a", "b", "bad", *PREFIXES])
            simulation.add(prompt, min(new, 12), adapter, score=prompt > 1 and rng.random() < 0.2)
        if simulation.alive and rng.random() < 0.2:
            simulation.end(rng.choice(simulation.alive))
        simulation.step()
    simulation.run(limit=5000)
    for sequence, error in simulation.failed:
        if sequence.request.adapter != ref("bad"):
            assert isinstance(error, InvalidRequestError)
            assert sequence.num_prefix_tokens + sequence.num_prompt_tokens + 1 > context - sequence.is_score


def test_prompts_are_cut_to_the_budget_and_decodes_come_first():
    simulation = Simulation(pages=30, batch_tokens=10)
    first = simulation.add(3, 9)
    second = simulation.add(25, 2)
    steps = [
        [(entry.sequence is second, entry.num_new) for entry in simulation.step().batch] for _ in range(5)
    ]
    assert steps == [
        [(False, 3), (True, 7)],
        [(False, 1), (True, 9)],
        [(False, 1), (True, 9)],
        [(False, 1), (True, 1)],
        [(False, 1)],
    ]
    assert first.num_generated == 5


def test_the_youngest_is_preempted_keeps_its_slot_and_resumes_with_its_tokens():
    simulation = Simulation(pages=4, batch_tokens=16)
    old = simulation.add(5, 8, "a")
    young = simulation.add(3, 9, "b")
    while not simulation.scheduler.num_preemptions:
        simulation.step()
    assert young.num_computed == 0
    assert young.pages == []
    assert young.slot is not None
    assert young.num_generated > 0
    generated = young.num_generated
    assert simulation.scheduler.running == [old]
    simulation.run()
    assert simulation.order_ended == [old, young]
    assert young.num_generated == 9 > generated


def test_nobody_overtakes_a_request_that_waits_for_pages():
    simulation = Simulation(pages=5, batch_tokens=32)
    simulation.add(8, 5)
    large = simulation.add(17, 1)
    small = simulation.add(1, 1)
    simulation.run()
    assert simulation.order_ended.index(large) < simulation.order_ended.index(small)


def test_others_overtake_a_request_that_waits_for_its_adapter():
    simulation = Simulation(pages=10, adapters=FakeAdapters(load_steps=6))
    slow = simulation.add(2, 1, "a")
    fast = simulation.add(2, 1)
    simulation.run()
    assert simulation.order_ended == [fast, slow]


def test_a_request_waits_for_a_slot_until_one_is_idle():
    simulation = Simulation(pages=20, adapters=FakeAdapters(num_slots=1))
    simulation.add(2, 5, "a")
    simulation.add(2, 5, "b")
    simulation.add(2, 5, "a")
    simulation.run()
    assert [sequence.request.adapter for sequence in simulation.order_ended] == [ref("a"), ref("a"), ref("b")]


def test_all_that_wait_for_a_failed_load_fail_with_it():
    simulation = Simulation(pages=10, adapters=FakeAdapters(load_steps=3))
    broken = [simulation.add(2, 1, "bad") for _ in range(5)]
    other = simulation.add(2, 1, "a")
    simulation.run()
    assert [sequence for sequence, _ in simulation.failed] == broken
    assert len({id(error) for _, error in simulation.failed}) == 1
    assert simulation.adapters.loads.count(ref("bad")) == 1
    assert other in simulation.order_ended


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_removed_sequence_leaves_nothing_behind(steps):
    simulation = Simulation(pages=10, batch_tokens=6, adapters=FakeAdapters(load_steps=1))
    sequences = [simulation.add(9, 5, "a"), simulation.add(3, 2), simulation.add(30, 5, "b")]
    for _ in range(steps):
        simulation.step()
    for sequence in sequences:
        if sequence in simulation.alive:
            simulation.end(sequence)
    assert simulation.cache.pages.num_used == 0
    assert not +simulation.adapters.users
    assert not simulation.scheduler.running
    assert not simulation.scheduler.waiting
