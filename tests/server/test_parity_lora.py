"""LoRA against PEFT on a tiny Llama: each variant alone, and crowds under pressure."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.adapters import LORA_VARIANTS, Oracle, edit_config, write_lora
from support.models import explain, random_prompt
from support.running import Outcome, Running

NEW_TOKENS = 24
NUM_LATE = 5
PROMPT_LENGTHS = (1, 500, 3, 64, 17, 250, 16, 2, 120, 33, 9, 77, 5, 400, 48, 30)
SAMPLED = (
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1},
)
# What follows needs all of these: see `assert_pressure`.
PRESSURE: dict[str, Any] = {"kv_pages": 270, "page_size": 2, "slots": 4, "max_batch_tokens": 64}


@pytest.fixture(scope="module")
def adapters(llama, tmp_path_factory):
    """The store, and the names of its adapters: every variant, and two in half precision."""
    store = tmp_path_factory.mktemp("store")
    variants = {name: dict(options) for name, options in LORA_VARIANTS.items()}
    variants["bfloat16"] = LORA_VARIANTS["qv"] | {"dtype": torch.bfloat16}
    variants["float16"] = LORA_VARIANTS["rank_pattern"] | {"dtype": torch.float16}
    for seed, (name, options) in enumerate(variants.items()):
        write_lora(llama, store / "acme" / name / "1", seed=seed, **options)
    return store, [f"acme/{name}" for name in variants]


@pytest.fixture(scope="module")
def oracle(llama, adapters):
    store, names = adapters
    return Oracle(llama, {name: store / name / "1" for name in names})


def assert_equal(oracle: Oracle, adapter: str | None, outcome: Outcome) -> None:
    prompt = outcome.request.prompt_ids
    expected = oracle.generate(adapter, prompt, NEW_TOKENS)
    got = outcome.result().tokens
    assert got == expected, f"{adapter}: " + explain(oracle.model(adapter), prompt, expected, got)


def test_the_adapters_change_what_the_base_says(oracle, adapters):
    prompt = random_prompt(20, seed=1)
    answers = {tuple(oracle.generate(name, prompt, NEW_TOKENS)) for name in [None, *adapters[1]]}
    assert len(answers) == len(adapters[1]) + 1


def test_every_variant_alone(llama_base, tokenizer, oracle, adapters):
    store, names = adapters
    with Running(llama_base, tokenizer, store, slots=len(names)) as running:
        for name in names:
            for length in (1, 20, 90):
                outcome = running.generate(
                    random_prompt(length, seed=length), name, max_new_tokens=NEW_TOKENS
                )
                assert_equal(oracle, name, outcome)


def crowd(names: list[str]) -> list[tuple[str | None, tuple[int, ...]]]:
    """Requests over eight adapters and the base; who comes first comes again when others took its slot."""
    users = [None, *names]
    requests = [
        (users[index * 2 % len(users)], random_prompt(length, seed=index))
        for index, length in enumerate(PROMPT_LENGTHS)
    ]
    return [*requests, *requests[:NUM_LATE]]


def arrive(running: Running, starts: list[Callable[[], Outcome]]) -> list[Outcome]:
    """A crowd: the last ones start when those before have ended, which is when slots have changed hands."""
    return [
        *running.arrive(starts[:-NUM_LATE], every=1),
        *running.arrive(starts[-NUM_LATE:], every=1),
    ]


def assert_pressure(running: Running) -> None:
    loads = [ref for kind, ref in running.recorder.adapter_events if kind == "loaded"]
    assert running.engine.stats().preemptions > 0
    assert running.recorder.count("evicted") > 0
    assert len(loads) > len(set(loads)), "an adapter came back after it was evicted"
    assert max(step.distinct_adapters for step in running.recorder.steps) > 1
    assert any(step.num_prefill_tokens and step.num_decode_tokens for step in running.recorder.steps)


@pytest.mark.parametrize("first", [0, 7])
def test_a_crowd_gets_the_same_tokens(first, llama_base, tokenizer, oracle, adapters):
    store, names = adapters
    requests = crowd(names[first : first + 8])
    assert {user for user, _ in requests} == {None, *names[first : first + 8]}
    with Running(llama_base, tokenizer, store, **PRESSURE) as running:
        outcomes = arrive(
            running,
            [partial(running.generate, prompt, user, max_new_tokens=NEW_TOKENS) for user, prompt in requests],
        )
        assert_pressure(running)
    for (user, _), outcome in zip(requests, outcomes, strict=True):
        assert_equal(oracle, user, outcome)


def test_seeded_samples_do_not_depend_on_the_crowd(llama_base, tokenizer, adapters):
    store, names = adapters
    requests = [
        (user, prompt, SAMPLED[index % len(SAMPLED)] | {"seed": index, "max_new_tokens": NEW_TOKENS})
        for index, (user, prompt) in enumerate(crowd(names[:8]))
    ]
    alone = []
    with Running(llama_base, tokenizer, store) as running:
        for user, prompt, sampling in requests:
            alone.append(running.generate(prompt, user, **sampling).result().tokens)
    with Running(llama_base, tokenizer, store, **PRESSURE) as running:
        outcomes = arrive(
            running,
            [partial(running.generate, prompt, user, **sampling) for user, prompt, sampling in requests],
        )
        assert_pressure(running)
    for (user, _, sampling), expected, outcome in zip(requests, alone, outcomes, strict=True):
        assert outcome.tokens == expected, (user, sampling)


def test_a_seed_repeats_and_others_differ(llama_base, tokenizer, adapters):
    store, names = adapters
    with Running(llama_base, tokenizer, store) as running:
        sampling = {"temperature": 1.0, "max_new_tokens": NEW_TOKENS}
        prompt = random_prompt(5, seed=0)
        seeds = (1, 1, 2, None, None)
        answers = [
            running.generate(prompt, names[0], seed=seed, **sampling).result().tokens for seed in seeds
        ]
        assert answers[0] == answers[1]
        assert len({tuple(answer) for answer in answers}) == 4


def test_scores_under_an_adapter(llama_base, tokenizer, oracle, adapters):
    store, names = adapters
    tokens = random_prompt(150, seed=5)
    with Running(llama_base, tokenizer, store, max_batch_tokens=32) as running:
        for name in (None, names[2], names[4]):
            with torch.inference_mode():
                logits = oracle.model(name)(input_ids=torch.tensor([tokens])).logits[0]
            expected = logits.log_softmax(-1)[torch.arange(149), list(tokens[1:])]
            got = [entry.logprob for entry in running.score(tokens, name).scored.logprobs]
            torch.testing.assert_close(torch.tensor(got), expected, atol=1e-4, rtol=0)


def test_all_linear_is_understood_where_it_was_left_unresolved(llama, llama_base, tokenizer, tmp_path):
    directory = write_lora(llama, tmp_path / "acme" / "raw" / "1", **LORA_VARIANTS["all_linear"])
    edit_config(directory, target_modules="all-linear")
    oracle = Oracle(llama, {"raw": directory})
    with Running(llama_base, tokenizer, tmp_path) as running:
        assert_equal(
            oracle,
            "raw",
            running.generate(random_prompt(9, seed=2), "acme/raw", max_new_tokens=NEW_TOKENS),
        )
