"""The pages of the methods name every option of their methods, and have the right counts of parameters."""

import re

import pytest
import torch
from hotswap_trainer import methods
from hotswap_trainer.options import specs
from peft import get_peft_model
from support.pages import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

PAGE_OF = {"qlora": "lora"}
# What the pages count, with the options of their tables.
COUNTED = {
    ("lora", "all linear layers, r = 16"): {},
    ("lora", "q and v alone"): {"target_modules": "q_proj,v_proj"},
    ("bottleneck", "both places"): {},
    ("prefix", ""): {},
    ("ia3", ""): {},
}


def page_of(method: str) -> str:
    return (ROOT / "docs" / "methods" / f"{PAGE_OF.get(method, method)}.md").read_text()


NUM_LAYERS = 30


def smollm2(**changes: int) -> LlamaForCausalLM:
    """SmolLM2-135M with random weights."""
    shape = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    return LlamaForCausalLM(LlamaConfig(**shape | changes, tie_word_embeddings=True))


@pytest.mark.parametrize("name", methods.available())
def test_every_option_is_on_the_page(name):
    page = page_of(name)
    missing = [spec.flag for spec in specs(methods.available()[name].options) if f"`{spec.flag}`" not in page]
    assert missing == []


@pytest.mark.parametrize("name", methods.available())
def test_every_default_on_the_page_is_the_default(name):
    rows = dict(re.findall(r"^\| `(--[a-z-]+)` \| ([^|]+) \|", page_of(name), re.MULTILINE))
    for spec in specs(methods.available()[name].options):
        shown = rows.get(spec.flag, "").strip(" `")
        if spec.default not in (None, True, False) and shown:
            assert str(spec.default).removesuffix(".0") == shown, spec.flag
        if isinstance(spec.default, bool) and shown:
            assert shown == ("on" if spec.default else "off"), spec.flag


@pytest.mark.parametrize(("name", "words"), COUNTED)
def test_counts_of_parameters_are_right(name, words):
    method = methods.available()[name]
    model = smollm2(vocab_size=8, num_hidden_layers=1)
    adapted = get_peft_model(model, method.peft_config(model, method.options(**COUNTED[name, words])))
    count = NUM_LAYERS * sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert re.search(rf"{words}[^|]*\b{count:,}\b", page_of(name)), f"{count:,}"
    assert f"{count:,}" in (ROOT / "README.md").read_text()


def test_the_count_of_all_parameters_is_right():
    with torch.device("meta"):
        count = sum(p.numel() for p in smollm2().parameters())
    assert f"| all | all | {count:,} |" in page_of("full")
    index = (ROOT / "docs" / "README.md").read_text()
    assert f"{count:,}" in index
    for number in ("4,884,480", "4,462,080", "230,400", "57,600"):
        assert number in index
