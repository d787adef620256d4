"""DoRA against PEFT, on a base with and one without biases: alone, and beside LoRA and the base."""

import pytest
from hotswap_server.errors import AdapterInvalidError
from support.adapters import ALL_LINEARS, Oracle, edit_tensors, write_lora
from support.models import FAMILIES, explain, prepared, random_prompt, tiny_model
from support.running import Running

NEW_TOKENS = 16
VARIANTS = {
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ALL_LINEARS},
    "patterns": {
        "r": 5,
        "lora_alpha": 3,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 9},
    },
    "plain": {"r": 7, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equals_peft_alone_and_in_a_crowd(family, tokenizer, tmp_path):
    model = tiny_model(FAMILIES[family])
    directories = {
        f"acme/{name}": write_lora(model, tmp_path / "acme" / name / "1", seed=seed, **options)
        for seed, (name, options) in enumerate(VARIANTS.items())
    }
    oracle = Oracle(model, directories)
    names = [None, *directories]
    prompts = [random_prompt(7 + 13 * index, seed=index) for index in range(8)]
    expected = [oracle.generate(names[i % 4], prompt, NEW_TOKENS) for i, prompt in enumerate(prompts)]
    assert len(set(map(tuple, expected))) == len(expected)
    with Running(prepared(model), tokenizer, tmp_path, slots=2, max_batch_tokens=40) as running:
        alone = [
            running.generate(p, names[i % 4], max_new_tokens=NEW_TOKENS).result()
            for i, p in enumerate(prompts)
        ]
        crowd = [running.generate(p, names[i % 4], max_new_tokens=NEW_TOKENS) for i, p in enumerate(prompts)]
        for index, prompt in enumerate(prompts):
            for outcome in (alone[index], crowd[index].result()):
                reference = oracle.model(names[index % 4])
                told = explain(reference, prompt, expected[index], outcome.tokens)
                assert outcome.tokens == expected[index], f"{names[index % 4]}: {told}"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: {n: v for n, v in t.items() if "layers.0" not in n or "magnitude" not in n},
            "there are no tensors",
        ),
        (lambda t: {n: v[:3] if "magnitude" in n else v for n, v in t.items()}, r"the base needs \[64\]"),
    ],
)
def test_magnitudes_that_are_missing_or_do_not_fit_are_named(
    llama, llama_base, tokenizer, tmp_path, edit, message
):
    directory = write_lora(
        llama, tmp_path / "acme" / "bad" / "1", r=2, use_dora=True, target_modules=["q_proj"]
    )
    edit_tensors(directory, edit)
    with (
        Running(llama_base, tokenizer, tmp_path) as running,
        pytest.raises(AdapterInvalidError, match=message),
    ):
        running.generate(random_prompt(5, seed=0), "acme/bad").result()
