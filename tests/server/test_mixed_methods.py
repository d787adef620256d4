"""Every method in one batch, against PEFT one request at a time; what fails changes nobody else's tokens."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hotswap_server.adapters.residency import InUse
from hotswap_server.errors import AdapterInvalidError, EngineError, InvalidRequestError
from support.adapters import (
    Oracle,
    edit_config,
    edit_tensors,
    write_bottleneck,
    write_ia3,
    write_lora,
    write_prefix,
)
from support.models import explain, random_prompt
from support.running import Outcome, Running, wait_until
from torch import nn

NEW_TOKENS = 24
WRITERS: dict[str, Callable[[nn.Module, Path], object]] = {
    "lora4": partial(write_lora, r=4, target_modules="all-linear"),
    "lora9": partial(write_lora, seed=1, r=9, target_modules=["q_proj", "v_proj"]),
    "embeddings": partial(write_lora, seed=3, r=3, target_modules=["embed_tokens", "lm_head", "up_proj"]),
    "houlsby": partial(write_bottleneck, bottleneck_size=8),
    "parallel": partial(
        write_bottleneck, seed=1, bottleneck_size=21, layout="parallel", activation="silu", after_mlp=False
    ),
    "prefix7": partial(write_prefix, tokens=7),
    "prefix33": partial(write_prefix, tokens=33, seed=1),
    "ia3": partial(
        write_ia3, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    # One more of each than there are slots in the test of eviction.
    "lora2": partial(write_lora, seed=2, r=2, target_modules=["o_proj", "gate_proj"]),
    "pfeiffer": partial(write_bottleneck, seed=2, bottleneck_size=5, layout="pfeiffer", residual=False),
    "prefix20": partial(write_prefix, tokens=20, seed=2),
}
TOGETHER = [None, "lora4", "lora9", "embeddings", "houlsby", "parallel", "prefix7", "prefix33", "ia3"]
METHODS = {"lora", "bottleneck", "prefix", "ia3"}


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    for name, write in WRITERS.items():
        write(llama, store / "acme" / name / "1")
    return store


@pytest.fixture(scope="module")
def oracles(llama, store):
    made = {name: Oracle(llama, {f"acme/{name}": store / "acme" / name / "1"}) for name in WRITERS}
    return made | {None: Oracle(llama, {})}


def full_name(name: str | None) -> str | None:
    return None if name is None else f"acme/{name}"


def assert_equal(oracles, name: str | None, outcome: Outcome, count: int = NEW_TOKENS) -> None:
    oracle, prompt = oracles[name], outcome.request.prompt_ids
    expected = oracle.generate(full_name(name), prompt, count)
    got = outcome.result().tokens
    assert got == expected, f"{name}: " + explain(oracle.model(full_name(name)), prompt, expected, got)


def load(running: Running, names: list[str | None]) -> None:
    for name in names:
        if name is not None:
            running.adapters.load(f"acme/{name}", None).result()


def start(running: Running, name: str | None, length: int, seed: int) -> tuple[str | None, Outcome]:
    prompt = random_prompt(length, seed=seed)
    return name, running.generate(prompt, full_name(name), max_new_tokens=NEW_TOKENS)


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
    names = [None, *WRITERS] * 2
    requests = [(names[i * order % len(names)], 1 + 9 * i % 100, i) for i in range(len(names))]
    assert {name for name, _, _ in requests} == {None, *WRITERS}
    pressure = {"kv_pages": 150, "page_size": 2, "slots": 2, "max_batch_tokens": 40}
    with Running(llama_base, tokenizer, store, **pressure) as running:
        # Of the base, so that memory alone decides who is preempted, however slowly adapters are loaded.
        plain = [
            running.generate(random_prompt(20, seed=100 + i), max_new_tokens=NEW_TOKENS) for i in range(8)
        ]
        arrivals = [
            partial(
                running.generate,
                random_prompt(length, seed=seed),
                full_name(name),
                max_new_tokens=NEW_TOKENS,
            )
            for name, length, seed in requests
        ]
        outcomes = running.arrive(arrivals, every=1)
        for outcome in plain:
            outcome.result()
        assert running.engine.stats().preemptions > 0
        for method in ("lora", "bottleneck", "prefix"):
            evicted = [r for kind, r in running.recorder.adapter_events if kind == "evicted"]
            assert method in {ref.method for ref in evicted}
        assert max(step.distinct_adapters for step in running.recorder.steps) > 1
    for outcome in plain:
        assert_equal(oracles, None, outcome)
    for (name, _, _), outcome in zip(requests, outcomes, strict=True):
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
            infinite = [
                running.generate(random_prompt(9, seed=1), f"acme/huge-{name}")
                for name in ("lora4", "houlsby", "prefix7")
            ]
            too_long = running.generate(random_prompt(180, seed=1), "acme/prefix33")
            gone = [running.generate(random_prompt(30, seed=2), full_name(name)) for name in TOGETHER]
            for outcome in gone:
                running.cancel(outcome)
            for outcome in invalid:
                assert isinstance(outcome.error, AdapterInvalidError)
                assert "unheard_of" in str(outcome.error)
            for outcome in infinite:
                assert isinstance(outcome.error, EngineError), round_number
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
