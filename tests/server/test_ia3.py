"""IA³ against PEFT on a tiny Llama: alone, beside LoRA and the base under pressure, and what is refused."""

import pytest
import torch
from hotswap_server.errors import AdapterInvalidError
from support.adapters import Oracle, edit_config, edit_tensors, write_ia3, write_lora
from support.models import explain, random_prompt
from support.running import Outcome, Running

NEW_TOKENS = 20
VARIANTS = {
    "usual": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "outputs": {"target_modules": ["q_proj", "o_proj", "up_proj"], "feedforward_modules": []},
    "attention_input": {"target_modules": ["o_proj", "k_proj"], "feedforward_modules": ["o_proj"]},
    "head": {"target_modules": ["v_proj", "lm_head"], "feedforward_modules": []},
    "head_input": {"target_modules": ["lm_head"], "feedforward_modules": ["lm_head"]},
    "regex": {
        "target_modules": r".*layers\.1\..*(v_proj|down_proj)",
        "feedforward_modules": r".*down_proj",
    },
}


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    for seed, (name, options) in enumerate(VARIANTS.items()):
        write_ia3(llama, store / "acme" / name / "1", seed=seed, **options)
    for seed, rank in enumerate((4, 9)):
        write_lora(
            llama, store / "acme" / f"lora{rank}" / "1", seed=seed, r=rank, target_modules="all-linear"
        )
    return store


@pytest.fixture(scope="module")
def oracles(llama, store):
    """One model each: in PEFT a module's scale is of one kind for all adapters that a model holds."""
    made = {None: Oracle(llama, {})}
    for name in [*VARIANTS, "lora4", "lora9"]:
        made[f"acme/{name}"] = Oracle(llama, {f"acme/{name}": store / "acme" / name / "1"})
    return made.__getitem__


def assert_equal(oracle: Oracle, name: str | None, outcome: Outcome) -> None:
    prompt = outcome.request.prompt_ids
    expected, got = oracle.generate(name, prompt, NEW_TOKENS), outcome.result().tokens
    assert got == expected, f"{name}: " + explain(oracle.model(name), prompt, expected, got)


def test_every_variant_alone(llama_base, tokenizer, store, oracles):
    prompt = random_prompt(20, seed=1)
    answers = {
        tuple(oracles(name).generate(name, prompt, NEW_TOKENS))
        for name in [None, *map("acme/{}".format, VARIANTS)]
    }
    assert len(answers) == len(VARIANTS) + 1
    with Running(llama_base, tokenizer, store) as running:
        for name in map("acme/{}".format, VARIANTS):
            for length in (1, 20, 90):
                outcome = running.generate(
                    random_prompt(length, seed=length), name, max_new_tokens=NEW_TOKENS
                )
                assert_equal(oracles(name), name, outcome)


NAMES = [None, *(f"acme/{name}" for name in VARIANTS), "acme/lora4", "acme/lora9"]


def crowd(running: Running) -> list[tuple[str | None, Outcome]]:
    return [
        (name, running.generate(random_prompt(5 + 9 * i, seed=i), name, max_new_tokens=NEW_TOKENS))
        for i, name in enumerate([*NAMES, *NAMES])
    ]


def test_beside_lora_and_the_base_while_adapters_are_evicted(llama_base, tokenizer, store, oracles):
    with Running(llama_base, tokenizer, store, slots=2, max_batch_tokens=48) as running:
        for name, outcome in crowd(running):
            assert_equal(oracles(name), name, outcome)
        assert running.recorder.count("evicted") > 0


def test_beside_lora_and_the_base_while_requests_are_preempted(llama_base, tokenizer, store, oracles):
    with Running(llama_base, tokenizer, store, kv_pages=200, page_size=2, max_batch_tokens=48) as running:
        for name in NAMES[1:]:  # all resident, so that memory alone holds requests back
            running.generate(random_prompt(3, seed=0), name, max_new_tokens=1).result()
        for name, outcome in crowd(running):
            assert_equal(oracles(name), name, outcome)
        assert running.engine.stats().preemptions > 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: edit_config(d, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda d: edit_config(d, fan_in_fan_out=True), "fan_in_fan_out"),
        (lambda d: edit_config(d, target_modules=["k_proj", "down_proj"]), "is no target"),
        (lambda d: edit_config(d, feedforward_modules=["v_proj", "down_proj"]), r"v_proj.ia3_l: is \["),
        (
            lambda d: edit_tensors(d, lambda t: t | {"base_model.model.x.other": torch.ones(2)}),
            "nothing would use it",
        ),
        (lambda d: edit_tensors(d, lambda t: dict(list(t.items())[1:])), "for which there are no tensors"),
    ],
)
def test_refusals_name_the_field_or_tensor(llama, llama_base, tokenizer, tmp_path, edit, message):
    edit(write_ia3(llama, tmp_path / "acme" / "bad" / "1", **VARIANTS["usual"]))
    with (
        Running(llama_base, tokenizer, tmp_path) as running,
        pytest.raises(AdapterInvalidError, match=message),
    ):
        running.generate(random_prompt(5, seed=0), "acme/bad").result()


def test_an_input_shared_with_others_cannot_be_scaled(llama, llama_base, tokenizer, tmp_path):
    write_ia3(
        llama, tmp_path / "acme" / "bad" / "1", target_modules=["up_proj"], feedforward_modules=["up_proj"]
    )
    shared = pytest.raises(AdapterInvalidError, match="shares its input")
    with Running(llama_base, tokenizer, tmp_path) as running, shared:
        running.generate(random_prompt(5, seed=0), "acme/bad").result()
