"""Every method in one batch, against PEFT one request at a time; what fails changes nobody else's tokens."""

import shutil
from pathlib import Path

import pytest
from hotswap_server.adapters.residency import InUse
from hotswap_server.errors import (
    AdapterInvalidError,
    AdapterQuarantinedError,
    EngineError,
    InvalidRequestError,
)
from support.adapters import edit_config, edit_tensors
from support.mixed import (
    NEW_TOKENS,
    PRESSURE,
    TOGETHER,
    WRITERS,
    arrive_under_pressure,
    assert_equal,
    full_name,
    load,
    make_oracles,
    start,
    write_store,
)
from support.models import random_prompt
from support.running import Running, wait_until

METHODS = {"lora", "bottleneck", "prefix", "ia3"}


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    return write_store(llama, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def oracles(llama, store):
    return make_oracles(llama, store)


def test_the_methods_are_those_that_are_served_and_each_matters(llama_base, tokenizer, store, oracles):
    prompt = random_prompt(20, seed=1)
    answers = {tuple(oracles[n].generate(full_name(n), prompt, NEW_TOKENS)) for n in [None, *WRITERS]}
    assert len(answers) == len(WRITERS) + 1
    with Running(llama_base, tokenizer, store) as running:
        assert set(running.adapters.slot_counts()) == METHODS
        assert {running.ref(full_name(name)).method for name in WRITERS} == METHODS


def test_all_methods_share_a_step(llama_base, tokenizer, store, oracles):
    with Running(llama_base, tokenizer, store) as running:
        load(running, TOGETHER)
        outcomes = [start(running, name, 3 + 13 * i, seed=i) for i, name in enumerate(TOGETHER)]
        for name, outcome in outcomes:
            assert_equal(oracles, name, outcome)
        assert max(step.distinct_adapters for step in running.recorder.steps) == len(TOGETHER) - 1


@pytest.mark.parametrize("order", [1, 5])
def test_ragged_arrivals_preemption_and_eviction(order, llama_base, tokenizer, store, oracles):
    with Running(llama_base, tokenizer, store, **PRESSURE) as running:
        plain, others = arrive_under_pressure(running, order)
    for outcome in plain:
        assert_equal(oracles, None, outcome)
    for name, outcome in others:
        assert_equal(oracles, name, outcome)


def test_scores_in_a_mixed_batch(llama_base, tokenizer, store):
    tokens = random_prompt(40, seed=8)
    with Running(llama_base, tokenizer, store) as running:
        alone = [
            [entry.logprob for entry in running.score(tokens, full_name(name)).scored.logprobs]
            for name in TOGETHER
        ]
    with Running(llama_base, tokenizer, store, max_batch_tokens=100) as running:
        load(running, TOGETHER)
        scores = [running.score(tokens, full_name(name)) for name in TOGETHER]
        for expected, outcome in zip(alone, scores, strict=True):
            got = [entry.logprob for entry in outcome.scored.logprobs]
            assert got == pytest.approx(expected, abs=1e-4)


def huge(directory: Path) -> None:
    """Finite weights whose products are not."""
    edit_tensors(directory, lambda tensors: {name: tensor * 3e37 for name, tensor in tensors.items()})


def test_failures_change_no_neighbour(llama, llama_base, tokenizer, store, oracles, tmp_path):
    """Loads that fail, results that are not finite, prompts that do not fit, callers that leave."""
    shutil.copytree(store / "acme", tmp_path / "acme")
    for name in ("lora4", "houlsby", "prefix7", "ia3"):
        WRITERS[name](llama, tmp_path / "acme" / f"bad-{name}" / "1")
        edit_config(tmp_path / "acme" / f"bad-{name}" / "1", unheard_of=True)
    for name in ("lora4", "houlsby", "prefix7"):
        WRITERS[name](llama, tmp_path / "acme" / f"huge-{name}" / "1")
        huge(tmp_path / "acme" / f"huge-{name}" / "1")
    with Running(llama_base, tokenizer, tmp_path, max_batch_tokens=64, max_context=200) as running:
        load(running, TOGETHER)
        for round_number in range(2):
            outcomes = [start(running, name, 5 + 11 * i, seed=i) for i, name in enumerate(TOGETHER)]
            invalid = [
                running.generate(random_prompt(9, seed=1), f"acme/bad-{name}")
                for name in ("lora4", "houlsby", "prefix7", "ia3")
            ]
            infinite = []
            for name in ("lora4", "houlsby", "prefix7"):
                if round_number == 0:
                    infinite.append(running.generate(random_prompt(9, seed=1), f"acme/huge-{name}"))
                    continue
                with pytest.raises(AdapterQuarantinedError, match=f"acme/huge-{name}"):
                    running.generate(random_prompt(9, seed=1), f"acme/huge-{name}")
            too_long = running.generate(random_prompt(180, seed=1), "acme/prefix33")
            gone = [running.generate(random_prompt(30, seed=2), full_name(name)) for name in TOGETHER]
            for outcome in gone:
                running.cancel(outcome)
            for outcome in invalid:
                assert isinstance(outcome.error, AdapterInvalidError)
                assert "unheard_of" in str(outcome.error)
            for outcome in infinite:
                assert isinstance(outcome.error, EngineError)
            assert isinstance(too_long.error, InvalidRequestError)
            for name, outcome in outcomes:
                assert_equal(oracles, name, outcome)


def test_unloading_everything_gives_everything_back(llama_base, tokenizer, store, oracles):
    with Running(llama_base, tokenizer, store, page_size=4) as running:
        outcomes = [start(running, name, 5, seed=i) for i, name in enumerate(TOGETHER)]
        for name, outcome in outcomes:
            assert_equal(oracles, name, outcome)
        wait_until(lambda: running.engine.idle)
        stats = running.engine.stats()
        assert stats.kv_pages_used == stats.kv_pages_prefixes == 7 // 4 + 33 // 4
        for name in TOGETHER[1:]:
            assert running.adapters.unload(f"acme/{name}", None, in_use=InUse.REFUSE).result() == 1
        wait_until(lambda: running.engine.stats().kv_pages_used == 0)
        assert {taken for taken, _ in running.adapters.slot_counts().values()} == {0}
        again = [start(running, name, 5, seed=i) for i, name in enumerate(TOGETHER)]
        for name, outcome in again:
            assert_equal(oracles, name, outcome)


def test_a_closed_manager_leaves_the_base_bare(llama_base, tokenizer, store, oracles):
    with Running(llama_base, tokenizer, store) as running:
        load(running, TOGETHER)
        assert llama_base.prefixes
        assert any(block.deltas for block in llama_base.blocks)
    assert not llama_base.prefixes
    assert not any(block.deltas for block in llama_base.blocks)
    assert not any(group.deltas or group.inputs for group in llama_base.projections)
