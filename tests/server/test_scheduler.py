"""The scheduler against a runner that only counts: nothing leaks, limits hold, everything ends."""

import random

import pytest
from hotswap_server.errors import InvalidRequestError
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduling import PAGE, PREFIXES, FakeAdapters, Simulation, ref


@settings(max_examples=100, deadline=None)
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
