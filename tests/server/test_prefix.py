"""Prefix tuning against PEFT: the prefix's place and positions, and pages that requests share."""

import json
from functools import partial

import pytest
import torch
from hotswap_server.adapters.residency import InUse
from hotswap_server.engine.prefixes import PrefixPages
from hotswap_server.errors import AdapterInvalidError, EngineError, InvalidRequestError
from safetensors.torch import load_file
from support.adapters import Oracle, edit_config, edit_tensors, write_lora, write_prefix
from support.models import FAMILIES, MAX_CONTEXT, explain, prepared, random_prompt, tiny_model
from support.running import Outcome, Running, wait_until

NEW_TOKENS = 20
PAGE = 16
LENGTHS = {"one": 1, "short": 5, "page": 16, "usual": 20, "long": 50}


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    for seed, (name, tokens) in enumerate(LENGTHS.items()):
        write_prefix(llama, store / "acme" / name / "1", tokens, seed=seed)
    write_prefix(llama, store / "acme" / "projected" / "1", 9, prefix_projection=True, encoder_hidden_size=24)
    write_lora(llama, store / "acme" / "lora" / "1", r=4, target_modules="all-linear")
    return store


@pytest.fixture(scope="module")
def oracles(llama, store):
    """One model each, as PEFT holds prefixes of one shape alone."""
    made = {None: Oracle(llama, {})}
    for name in [*LENGTHS, "projected", "lora"]:
        made[f"acme/{name}"] = Oracle(llama, {f"acme/{name}": store / "acme" / name / "1"})
    return made.__getitem__


def assert_equal(oracle: Oracle, name: str | None, outcome: Outcome, count: int = NEW_TOKENS) -> None:
    prompt = outcome.request.prompt_ids
    expected, got = oracle.generate(name, prompt, count), outcome.result().tokens
    assert got == expected, f"{name}: " + explain(oracle.model(name), prompt, expected, got)


def prefix_pages(running: Running) -> int:
    stats = running.engine.stats()
    assert stats.kv_pages_used == stats.kv_pages_prefixes
    return stats.kv_pages_used


def test_every_length_alone(llama_base, tokenizer, store, oracles):
    names = [f"acme/{name}" for name in [*LENGTHS, "projected"]]
    prompt = random_prompt(20, seed=1)
    answers = {tuple(oracles(name).generate(name, prompt, NEW_TOKENS)) for name in [None, *names]}
    assert len(answers) == len(names) + 1, "each prefix matters"
    with Running(llama_base, tokenizer, store) as running:
        for name in names:
            for length in (1, 20, 90):
                outcome = running.generate(
                    random_prompt(length, seed=length), name, max_new_tokens=NEW_TOKENS
                )
                assert_equal(oracles(name), name, outcome)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gemma3"])
def test_other_families_and_sliding_windows(family, tokenizer, tmp_path):
    model = tiny_model(FAMILIES[family])
    names = {"acme/short": 7, "acme/over-the-window": 30}
    for name, tokens in names.items():
        write_prefix(model, tmp_path / name / "1", tokens)
    with Running(prepared(model), tokenizer, tmp_path) as running:
        for name in names:
            oracle = Oracle(model, {name: tmp_path / name / "1"})
            for length in (1, 12, 60):
                prompt = random_prompt(length, seed=length)
                assert_equal(oracle, name, running.generate(prompt, name, max_new_tokens=NEW_TOKENS))


def test_different_lengths_in_a_batch_under_pressure(llama_base, tokenizer, store, oracles):
    names = [None, "acme/usual", "acme/long", "acme/lora", "acme/short", "acme/page"]
    requests = [(name, random_prompt(3 + 11 * i, seed=i)) for i, name in enumerate([*names, *names])]
    pressure = {"kv_pages": 140, "page_size": 2, "slots": 2, "max_batch_tokens": 40}
    with Running(llama_base, tokenizer, store, **pressure) as running:
        # Of the base, so that memory alone decides who is preempted, however slowly adapters are loaded.
        plain = [
            running.generate(random_prompt(20, seed=100 + i), max_new_tokens=NEW_TOKENS) for i in range(8)
        ]
        outcomes = running.arrive(
            [partial(running.generate, prompt, name, max_new_tokens=NEW_TOKENS) for name, prompt in requests],
            every=1,
        )
        for (name, _), outcome in zip(requests, outcomes, strict=True):
            assert_equal(oracles(name), name, outcome)
        for outcome in plain:
            assert_equal(oracles(None), None, outcome)
        assert running.engine.stats().preemptions > 0
        assert running.recorder.count("evicted") > 0


@pytest.mark.parametrize("budget", [512, 7])
def test_scores_follow_the_prefix(budget, llama_base, tokenizer, store, oracles):
    tokens = random_prompt(60, seed=5)
    with Running(llama_base, tokenizer, store, max_batch_tokens=budget) as running:
        for name in ("acme/usual", "acme/short", None):
            with torch.inference_mode():
                logits = oracles(name).model(name)(input_ids=torch.tensor([tokens])).logits[0]
            expected = logits.log_softmax(-1)[torch.arange(59), list(tokens[1:])]
            got = [entry.logprob for entry in running.score(tokens, name).scored.logprobs]
            torch.testing.assert_close(torch.tensor(got), expected, atol=1e-4, rtol=0)


def test_requests_share_the_full_pages_and_own_the_rest(llama_base, tokenizer, store):
    users = 6
    with Running(llama_base, tokenizer, store) as running:
        for _ in range(users):
            running.generate(random_prompt(5, seed=1), "acme/long", max_new_tokens=4)
        wait_until(lambda: running.engine.idle)
        # 50 tokens are three pages and two tokens; those and 5 + 4 more fit one page of each request.
        assert max(step.kv_pages_used for step in running.recorder.steps) == 3 + users
        assert prefix_pages(running) == 3


def test_the_same_content_under_two_names_takes_the_same_pages(llama, llama_base, tokenizer, tmp_path):
    for name in ("first", "second"):
        write_prefix(llama, tmp_path / "acme" / name / "1", 40, seed=3)
    with Running(llama_base, tokenizer, tmp_path) as running:
        outcomes = [
            running.generate(random_prompt(5, seed=1), f"acme/{name}").result()
            for name in ("first", "second")
        ]
        assert outcomes[0].tokens == outcomes[1].tokens
        assert prefix_pages(running) == 2
        running.adapters.unload("acme/first", None, in_use=InUse.REFUSE).result()
        again = running.generate(random_prompt(5, seed=1), "acme/second").result()
        assert again.tokens == outcomes[0].tokens
        assert prefix_pages(running) == 2


def test_eviction_and_unload_give_the_pages_back(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store, slots=1) as running:
        running.generate(random_prompt(5, seed=1), "acme/long").result()
        assert prefix_pages(running) == 3
        running.generate(random_prompt(5, seed=1), "acme/usual").result()
        assert prefix_pages(running) == 1
        assert running.adapters.unload("acme/usual", None, in_use=InUse.REFUSE).result() == 1
        wait_until(lambda: prefix_pages(running) == 0)
        assert running.adapters.slot_counts()["prefix"] == (0, 1)


def test_the_last_user_of_an_unloaded_prefix_keeps_its_pages(llama_base, tokenizer, store, oracles):
    with Running(llama_base, tokenizer, store) as running:
        unloaded = []
        running.recorder.after_step[4].append(
            lambda: unloaded.append(running.adapters.unload("acme/long", None, in_use=InUse.WAIT))
        )
        outcome = running.generate(random_prompt(5, seed=1), "acme/long", max_new_tokens=NEW_TOKENS)
        assert_equal(oracles("acme/long"), "acme/long", outcome)
        assert unloaded[0].result() == 1
        assert running.recorder.steps[6].kv_pages_used == 4
        wait_until(lambda: running.engine.stats().kv_pages_used == 0)


def test_an_unload_that_cancels_frees_the_pages(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store) as running:
        outcome = running.generate(random_prompt(5, seed=1), "acme/long", max_new_tokens=900)
        wait_until(lambda: outcome.events)
        assert running.adapters.unload("acme/long", None, in_use=InUse.CANCEL).result() == 1
        assert outcome.error is not None
        wait_until(lambda: running.engine.stats().kv_pages_used == 0)


def test_idle_prefixes_make_room_and_are_written_again(llama_base, tokenizer, store, oracles):
    with Running(llama_base, tokenizer, store, kv_pages=8) as running:
        for name in ("acme/long", "acme/usual"):
            running.generate(random_prompt(5, seed=1), name).result()
        assert prefix_pages(running) == 4
        large = running.generate(random_prompt(100, seed=2), max_new_tokens=NEW_TOKENS)
        assert_equal(oracles(None), None, large)
        assert prefix_pages(running) == 0
        outcome = running.generate(random_prompt(9, seed=3), "acme/long", max_new_tokens=NEW_TOKENS)
        assert_equal(oracles("acme/long"), "acme/long", outcome)
        assert running.recorder.count("loaded") == 2


def test_prefixes_of_preempted_requests_block_nobody(llama_base, tokenizer, store, oracles):
    """Each needs nearly every page; one that waits for its turn holds its slot, but no pages."""
    with Running(llama_base, tokenizer, store, kv_pages=40, page_size=2) as running:
        outcomes = [
            (name, running.generate(random_prompt(4, seed=i), name, max_new_tokens=24))
            for i, name in enumerate(["acme/long", "acme/usual", "acme/page", "acme/long"])
        ]
        for name, outcome in outcomes:
            assert_equal(oracles(name), name, outcome, 24)
        assert running.engine.stats().preemptions > 0


def test_the_context_holds_the_prefix_too(llama_base, tokenizer, store, oracles):
    with Running(llama_base, tokenizer, store, kv_pages=5) as running:
        assert running.engine.max_context == 5 * PAGE
        neighbour = running.generate(random_prompt(20, seed=1), "acme/long", max_new_tokens=None)
        late = running.generate(random_prompt(30, seed=1), "acme/long")
        assert_equal(oracles("acme/long"), "acme/long", neighbour, 5 * PAGE - 50 - 20)
        with pytest.raises(InvalidRequestError, match="with the 50 of acme/long@1's prefix"):
            late.result()
        with pytest.raises(InvalidRequestError, match="takes 30 at most"):
            running.score(random_prompt(31, seed=1), "acme/long").result()
        assert len(running.score(random_prompt(30, seed=1), "acme/long").scored.logprobs) == 29
        assert len(running.generate(random_prompt(30, seed=1)).result().tokens) == 8


def test_a_prefix_that_could_not_be_written_is_written_again(
    llama_base, tokenizer, store, oracles, monkeypatch
):
    write, failures = PrefixPages._write, iter([True])

    def fail_once(self, prefix, index, page):
        if index == 2 and next(failures, False):
            raise RuntimeError("no memory")
        write(self, prefix, index, page)

    monkeypatch.setattr(PrefixPages, "_write", fail_once)
    with Running(llama_base, tokenizer, store) as running:
        failed = running.generate(random_prompt(5, seed=1), "acme/long")
        assert isinstance(failed.error, EngineError)
        assert prefix_pages(running) == 0
        outcome = running.generate(random_prompt(5, seed=1), "acme/long", max_new_tokens=NEW_TOKENS)
        assert_equal(oracles("acme/long"), "acme/long", outcome)


def test_details_and_metrics_have_the_methods_name(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store) as running:
        running.generate(random_prompt(5, seed=1), "acme/projected").result()
        info = running.adapters.get("acme/projected", None)
        assert {name: json.loads(value) for name, value in info.details.items()} == {
            "num_virtual_tokens": 9,
            "prefix_projection": True,
        }
        assert info.num_parameters == 9 * 2 * 2 * 32
        assert info.ref.method == "prefix"
        assert [record.method for record in running.recorder.requests] == ["prefix"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: edit_config(d, num_virtual_tokens=19), r"prompt_embeddings: is \[20, 128\]"),
        (lambda d: edit_config(d, num_virtual_tokens="20"), "num_virtual_tokens must be a whole number"),
        (lambda d: edit_config(d, num_virtual_tokens=None), "num_virtual_tokens must be"),
        (lambda d: edit_config(d, num_layers=3), "num_layers is 3, the base's cache needs 2"),
        (lambda d: edit_config(d, num_attention_heads=4), "num_attention_heads is 4"),
        (lambda d: edit_config(d, token_dim=64), "token_dim is 64"),
        (lambda d: edit_config(d, num_transformer_submodules=2), "num_transformer_submodules"),
        (lambda d: edit_config(d, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda d: edit_config(d, task_type="SEQ_2_SEQ_LM"), "SEQ_2_SEQ_LM"),
        (lambda d: edit_tensors(d, lambda t: t | {"other": torch.ones(2)}), "tensor other"),
        (lambda d: edit_tensors(d, lambda t: {"other": torch.ones(2)}), "tensor other"),
    ],
)
def test_refusals_name_the_field_or_tensor(llama, llama_base, tokenizer, tmp_path, edit, message):
    edit(write_prefix(llama, tmp_path / "acme" / "bad" / "1", 20))
    with (
        Running(llama_base, tokenizer, tmp_path) as running,
        pytest.raises(AdapterInvalidError, match=message),
    ):
        running.generate(random_prompt(5, seed=0), "acme/bad").result()


def test_a_prefix_as_long_as_the_context_is_refused(llama, llama_base, tokenizer, tmp_path):
    directory = write_prefix(llama, tmp_path / "acme" / "bad" / "1", MAX_CONTEXT)
    assert load_file(directory / "adapter_model.safetensors")["prompt_embeddings"].shape[0] == MAX_CONTEXT
    refused = pytest.raises(AdapterInvalidError, match="leaves no room")
    with Running(llama_base, tokenizer, tmp_path) as running, refused:
        running.generate(random_prompt(5, seed=0), "acme/bad").result()
