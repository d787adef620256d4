"""`hotswap merge` against PEFT: the weights of merge_and_unload, the tokens of generate."""

import copy

import pytest
import torch
from hotswap_client.cli._app import app
from peft import PeftModel
from support.adapters import ALL_LINEARS, Oracle, edit_tensors, write_lora, write_prefix
from support.models import FAMILIES, SHAPE, generate_greedily, random_prompt, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

BASES = {
    "llama": FAMILIES["llama"],
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": FAMILIES["qwen2"],
    "gemma": FAMILIES["gemma"],
}
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ALL_LINEARS}
ADAPTERS = {
    "lora": LORA,
    "dora": LORA | {"use_dora": True},
    "head": {"r": 3, "target_modules": ["lm_head", "q_proj"]},
    "embedding": {"r": 3, "target_modules": ["embed_tokens", "v_proj"]},
    "dora_embedding": {"r": 3, "use_dora": True, "target_modules": ["embed_tokens", "v_proj"]},
    "biases": {"r": 3, "target_modules": ["q_proj"], "bias": "all"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer):
    """Saved models, made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            directory, model = tmp_path_factory.mktemp(name), tiny_model(BASES[name])
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            made[name] = directory, model
        return made[name]

    return get


def run(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def load(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.set_attn_implementation("eager")
    return model.eval()


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ("llama", "lora"),
        ("llama", "dora"),
        ("llama", "head"),
        ("tied", "lora"),
        ("tied", "head"),
        ("tied", "embedding"),
        ("qwen2", "dora"),
        ("qwen2", "biases"),
        ("gemma", "embedding"),
        ("gemma", "dora_embedding"),
    ],
)
def test_generates_what_peft_does(bases, tmp_path, base, adapter):
    path, model = bases(base)
    directory = write_lora(model, tmp_path / "adapter", **ADAPTERS[adapter])
    result = run(directory, "--base", path, "--output", tmp_path / "out" / "merged")
    assert result.exit_code == 0, result.output
    merged = load(tmp_path / "out" / "merged")
    oracle = Oracle(model, {"tested": directory})
    for seed in range(3):
        prompt = random_prompt(9, seed=seed)
        expected = oracle.generate("tested", prompt, 16)
        assert generate_greedily(merged, prompt, 16) == expected
    assert expected != oracle.generate(None, prompt, 16)
    # Of a tied weight PEFT's own merge changes both uses; its unmerged model, and ours, one.
    if base in ("llama", "qwen2") or adapter == "lora":
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), directory).merge_and_unload().state_dict()
        ours = merged.state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5, msg=name)
    assert (tmp_path / "out" / "merged" / "model.safetensors").exists()
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["merged"]
    again = AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")
    assert again("hello")["input_ids"] == AutoTokenizer.from_pretrained(path)("hello")["input_ids"]


def test_a_bfloat16_base_is_rounded_once(bases, tmp_path):
    _, model = bases("llama")
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(bases("llama")[0]).save_pretrained(tmp_path / "base")
    directory = write_lora(model, tmp_path / "adapter", **LORA)
    assert run(directory, "--base", tmp_path / "base", "--output", tmp_path / "merged").exit_code == 0
    ours = load(tmp_path / "merged").state_dict()
    theirs = PeftModel.from_pretrained(half, directory).merge_and_unload().state_dict()
    for name, tensor in theirs.items():
        assert ours[name].dtype is torch.bfloat16
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=2**-7, msg=name)


def test_an_adapter_of_a_store_by_name_and_version(bases, tmp_path):
    path, model = bases("llama")
    for version in (1, 2):
        write_lora(model, tmp_path / f"store/acme/x/{version}", seed=version, **LORA)
    given = ["--store", tmp_path / "store", "--base", path]
    assert run("acme/x@1", *given, "--output", tmp_path / "one").exit_code == 0
    assert run("acme/x", *given, "--output", tmp_path / "newest").exit_code == 0
    prompt = random_prompt(9, seed=1)
    for version, name in ((1, "one"), (2, "newest")):
        oracle = Oracle(model, {"tested": tmp_path / f"store/acme/x/{version}"})
        assert generate_greedily(load(tmp_path / name), prompt, 12) == oracle.generate("tested", prompt, 12)
    missing = run("acme/y", *given, "--output", tmp_path / "none")
    assert missing.exit_code == 2
    assert "acme/y" in missing.stderr
    assert not (tmp_path / "none").exists()


def test_mistakes_are_named_and_leave_nothing(bases, tmp_path):
    path, model = bases("llama")
    good = write_lora(model, tmp_path / "good", **LORA)
    bad = write_lora(model, tmp_path / "bad", **LORA)
    edit_tensors(bad, lambda tensors: {name: tensor * 1e20 for name, tensor in tensors.items()})
    own_bias = write_lora(model, tmp_path / "own_bias", r=2, target_modules=["q_proj"], lora_bias=True)
    prefix = write_prefix(model, tmp_path / "prefix", tokens=3)
    (tmp_path / "there").mkdir()
    cases = [
        (good, tmp_path / "there", "exists already"),
        (bad, tmp_path / "out", "is not finite"),
        (own_bias, tmp_path / "out", "the base has none there"),
        (prefix, tmp_path / "out", "is a prefix adapter; only LoRA"),
        (tmp_path / "nowhere", tmp_path / "out", "--store"),
        (tmp_path, tmp_path / "out", "adapter_config.json"),
    ]
    before = sorted(tmp_path.iterdir())
    for adapter, output, message in cases:
        result = run(adapter, "--base", path, "--output", output)
        assert result.exit_code == 2, message
        assert message in result.stderr
    assert sorted(tmp_path.iterdir()) == before
