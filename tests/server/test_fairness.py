"""Fairness between tenants: the bound of the virtual token counter, and that nobody starves."""

import random
import sys
from collections import Counter

import pytest
from hotswap_server.adapters.slots import PATIENCE
from hotswap_server.engine.fairness import FairnessOptions, VirtualTokenCounter
from hotswap_server.errors import InvalidRequestError
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduling import PAGE, FakeAdapters, Simulation, ref


def active(counter, *tenants):
    accounts = [counter.account(tenant) for tenant in tenants]
    for account in accounts:
        counter.activate(account)
    return accounts


def test_the_least_served_comes_first_and_of_equals_the_newcomer():
    counter = VirtualTokenCounter(FairnessOptions())
    a, b = active(counter, "a", "b")
    assert counter.first() is b
    counter.charge(b, input_tokens=3)
    assert counter.first() is a
    counter.charge(a, output_tokens=2)
    assert (a.service, b.service) == (4.0, 3.0)
    assert counter.first() is b
    counter.deactivate(b)
    assert counter.first() is a
    counter.deactivate(a)
    assert counter.first() is None


def test_a_tenant_that_comes_back_has_saved_up_nothing_and_is_forgiven_nothing():
    counter = VirtualTokenCounter(FairnessOptions())
    a, b, c = active(counter, "a", "b", "c")
    counter.deactivate(b)
    counter.charge(a, input_tokens=100)
    counter.charge(c, input_tokens=70)
    counter.activate(b)
    assert b.service == 70
    counter.charge(b, input_tokens=500)
    counter.deactivate(b)
    counter.activate(b)
    assert b.service == 570


def test_the_last_that_was_active_sets_the_level_for_the_next():
    counter = VirtualTokenCounter(FairnessOptions())
    (a,) = active(counter, "a")
    counter.charge(a, input_tokens=40)
    counter.deactivate(a)
    assert active(counter, "b")[0].service == 40


def test_a_weight_divides_what_is_charged():
    counter = VirtualTokenCounter(FairnessOptions(tenant_weights={"a": 4.0}))
    a, b = active(counter, "a", "b")
    counter.charge(a, input_tokens=40)
    counter.charge(b, input_tokens=40)
    assert (a.service, b.service) == (10.0, 40.0)


def test_accounts_of_tenants_that_left_are_kept_only_while_they_matter():
    counter = VirtualTokenCounter(FairnessOptions())
    (stays,) = active(counter, "stays")
    for index in range(1000):
        (account,) = active(counter, f"guest-{index}")
        counter.charge(account, input_tokens=5)
        counter.close(account)
        counter.charge(stays, input_tokens=1)
        counter.forget({"stays": stays})
    assert len(counter._accounts) < 20


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"input_token_weight": 0}, "input_token_weight"),
        ({"output_token_weight": float("nan")}, "output_token_weight"),
        ({"tenant_weights": {"acme": -1.0}}, "tenant_weights.acme"),
        ({"max_running_per_tenant": 0}, "max_running_per_tenant"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, field):
    with pytest.raises(InvalidRequestError, match=f"^{field}: "):
        FairnessOptions(**options)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch_size=st.integers(2, 5),
    batch_tokens=st.integers(4, 24),
    pages=st.integers(8, 20),
    weight=st.sampled_from([1.0, 1.0, 3.0]),
)
def test_service_of_two_tenants_that_always_wait_differs_by_a_bounded_amount(
    seed, batch_size, batch_tokens, pages, weight
):
    """Theorem 4.4 of the paper, for any other traffic and with preemption."""
    rng = random.Random(seed)
    simulation = Simulation(
        pages=pages, batch_size=batch_size, batch_tokens=batch_tokens, tenant_weights={"f": weight}
    )
    longest, most_new = 20, 8
    bound = 2 * (longest + 2 * batch_size * most_new)
    shapes = {"f": (longest, 2), "g": (3, most_new)}
    weights = {"f": weight, "g": 1.0}
    owned = {"f": [], "g": []}
    differences = []
    for _ in range(150):
        for tenant, (prompt, new) in shapes.items():
            while sum(s in simulation.scheduler.waiting for s in owned[tenant]) < 2:
                owned[tenant].append(
                    simulation.add(rng.randint(1, prompt), rng.randint(1, new), tenant=tenant, adapter=None)
                )
        if rng.random() < 0.3:
            adapter = rng.choice([None, "a", "b"])
            simulation.add(rng.randint(1, 12), rng.randint(1, 6), adapter, tenant=rng.choice("xyz"))
        simulation.step()
        served = {
            tenant: sum(s.num_prompt_tokens * s.charged + 2 * s.num_generated for s in owned[tenant])
            / weights[tenant]
            for tenant in shapes
        }
        differences.append(served["f"] - served["g"])
    assert max(differences) - min(differences) <= bound
    assert min(served.values()) > 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch_size=st.integers(1, 4),
    batch_tokens=st.integers(2, 16),
    pages=st.integers(6, 14),
    num_slots=st.integers(1, 2),
    load_steps=st.integers(0, 5),
    limit=st.sampled_from([None, 1, 2]),
    pattern=st.lists(
        st.tuples(
            st.sampled_from("wxyz"), st.sampled_from([None, "a", "b"]), st.integers(1, 16), st.integers(1, 6)
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_nobody_starves_under_any_pattern_of_arrivals(
    seed, batch_size, batch_tokens, pages, num_slots, load_steps, limit, pattern
):
    """Whatever the others send, and however fast, a request that waits ends in a bounded number of steps."""
    rng = random.Random(seed)
    simulation = Simulation(
        pages=pages,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        adapters=FakeAdapters(num_slots, load_steps),
        max_running_per_tenant=limit,
    )
    steps = 0

    def flood() -> None:
        nonlocal steps
        while len(simulation.scheduler.waiting) < 12:
            tenant, adapter, prompt, new = pattern[steps % len(pattern)]
            simulation.add(prompt, new, adapter, tenant=tenant)
            steps += 1
        simulation.step()

    for _ in range(rng.randint(0, 30)):
        flood()
    tenant, adapter = rng.choice("vw"), rng.choice([None, "a", "c"])
    patient = simulation.add(rng.randint(1, 2 * PAGE), rng.randint(1, 6), adapter, tenant=tenant)
    for _ in range(40 * PATIENCE):
        if patient not in simulation.alive:
            break
        flood()
    assert patient not in simulation.alive
    simulation.run()


def test_an_adapter_without_a_slot_gets_one_though_others_use_all_without_pause():
    simulation = Simulation(pages=40, adapters=FakeAdapters(num_slots=2))
    keep = {name: [simulation.add(2, 6, name) for _ in range(2)] for name in "ab"}
    simulation.step()
    late = simulation.add(2, 2, "c")
    for step in range(5 * PATIENCE):
        for name, sequences in keep.items():  # one of each always runs
            if step % 3 == 0:
                sequences.append(simulation.add(2, 6, name))
        simulation.step()
        if late not in simulation.alive:
            break
    assert late not in simulation.alive
    simulation.run()


def test_a_tenant_that_is_busy_with_one_adapter_still_gets_a_slot_for_another():
    """Tokens would put it behind all who have waited longer than they were served."""
    simulation = Simulation(pages=6, batch_size=1, batch_tokens=2, adapters=FakeAdapters(num_slots=1))
    for name in "xyz":
        simulation.add(1, 1, "a", tenant=name)
    late = simulation.add(1, 1, "a", tenant="busy")
    for step in range(8 * PATIENCE):
        simulation.add(1, 1, tenant="busy")
        simulation.add(1, 1, "a", tenant="xyz"[step % 3])
        simulation.step_unchecked()
        if late not in simulation.alive:
            break
    assert late not in simulation.alive


def test_the_tenant_that_was_given_fewest_slots_gets_the_next_one():
    simulation = Simulation(pages=40, adapters=FakeAdapters(num_slots=1))
    simulation.add(2, 4, "a", tenant="heavy")
    simulation.step()
    for name in "bcde":
        simulation.add(2, 4, name, tenant="heavy")
    simulation.step()
    light = simulation.add(2, 4, "z", tenant="light")
    simulation.run()
    assert simulation.order_ended.index(light) == 1


def test_a_tenant_without_anything_running_does_not_wait_for_a_place():
    simulation = Simulation(pages=60, batch_size=4)
    heavy = [simulation.add(2, 30, tenant="heavy") for _ in range(9)]
    for _ in range(4):
        simulation.step()
    assert simulation.scheduler.running == heavy[:4]
    light = simulation.add(2, 3, tenant="light")
    simulation.step()
    assert simulation.scheduler.running == [*heavy[:3], light]
    assert light.num_generated == 1
    for _ in range(3):
        simulation.step()
    assert simulation.scheduler.running == heavy[:4], "it comes back before those that never ran"
    simulation.run()


def test_a_tenant_without_anything_running_does_not_wait_for_pages():
    simulation = Simulation(pages=12, batch_size=8, batch_tokens=64)
    heavy = [simulation.add(8, 6, tenant="heavy") for _ in range(4)]
    for _ in range(3):
        simulation.step()
    light = simulation.add(8, 2, tenant="light")
    simulation.step()
    assert light in simulation.scheduler.running
    assert heavy[0] in simulation.scheduler.running
    simulation.run()


def test_the_most_served_tenant_gives_its_pages_back():
    simulation = Simulation(pages=8, batch_size=4, batch_tokens=32)
    heavy = [simulation.add(8, 12, tenant="heavy") for _ in range(2)]
    simulation.step()
    light = simulation.add(4, 12, tenant="light")
    while not simulation.scheduler.num_preemptions:
        simulation.step()
    assert heavy[1] in simulation.scheduler.waiting
    assert light in simulation.scheduler.running
    simulation.run()


def test_the_oldest_that_runs_is_never_preempted_so_that_something_ends():
    simulation = Simulation(pages=8, batch_size=4, batch_tokens=32)
    oldest = simulation.add(16, 12, tenant="heavy")
    simulation.step()
    young = [simulation.add(4, 10, tenant=tenant) for tenant in ("light", "other")]
    while oldest in simulation.alive:
        simulation.step()
        assert oldest in simulation.scheduler.running or oldest not in simulation.alive
    assert simulation.scheduler.num_preemptions
    assert any(sequence in simulation.alive for sequence in young)
    simulation.run()


def test_no_tenant_runs_more_than_it_may():
    simulation = Simulation(pages=40, batch_size=6, max_running_per_tenant=2)
    for tenant in "aab":
        for _ in range(4):
            simulation.add(2, 5, tenant=tenant)
    most = Counter()
    while simulation.alive:
        simulation.step()
        running = Counter(sequence.tenant for sequence in simulation.scheduler.running)
        most |= running
    assert most == {"a": 2, "b": 2}


def test_adapters_are_charged_to_their_tenant_and_the_base_to_who_asks():
    simulation = Simulation(pages=10)
    assert simulation.add(2, 1, "a", tenant="owner").tenant == "owner"
    assert simulation.add(2, 1, tenant="caller").tenant == "caller"
    assert ref("a", "owner").tenant == "owner"
    simulation.run()


@pytest.mark.parametrize("room", [True, False], ids=["room", "full"])
def test_the_cost_of_a_step_does_not_grow_with_the_queue(room):
    def calls(waiting: int) -> int:
        simulation = Simulation(
            pages=400, batch_size=8, batch_tokens=12 if room else 64, adapters=FakeAdapters(num_slots=4)
        )
        for index in range(waiting):
            adapter = None if index % 5 == 0 else f"adapter-{index % 40}"
            simulation.add(3 if room else 1, 20, adapter, tenant=f"tenant-{index % 7}")
        plan = simulation.scheduler.schedule
        for _ in range(20):
            simulation.step_unchecked()
        count = 0

        def profile(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        for _ in range(10):
            sys.setprofile(profile)
            try:
                plan_made = plan()
            finally:
                sys.setprofile(None)
            simulation.compute(plan_made)
        return count

    few, many = calls(100), calls(4000)
    assert many < 1.5 * few


def test_the_first_prompt_of_a_tenant_takes_no_more_steps_for_what_others_send():
    simulation = Simulation(pages=200, batch_size=8, batch_tokens=16)
    for _ in range(20):
        simulation.add(64, 4, tenant="heavy")
    for _ in range(6):
        simulation.step()
    light = simulation.add(40, 2, tenant="light")
    steps = 0
    while not light.num_generated:
        simulation.step()
        steps += 1
        simulation.add(64, 4, tenant="heavy")
    assert steps <= 3 + 1, "40 tokens in steps of 16, less what heavy ones decode"
    simulation.run()
