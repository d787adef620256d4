"""Embeddings, heads and biases of a LoRA that do not fit the base, or each other, are refused by name."""

import json

import pytest
import torch
from hotswap.layout import content_digest
from hotswap_server.adapters.checkpoint import parse_checkpoint
from hotswap_server.adapters.method import BankOptions
from hotswap_server.adapters.methods.lora import METHOD
from hotswap_server.core import AdapterRef
from hotswap_server.errors import AdapterInvalidError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from support.adapters import write_lora
from support.models import FAMILIES, VOCAB_SIZE, prepared, tiny_model

PREFIX = "base_model.model."
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"
A, B = f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.lora_embedding_B"
HEAD_A, HEAD_B = f"{HEAD}.lora_A.weight", f"{HEAD}.lora_B.weight"
COPIES = (f"{EMBEDDING}.base_layer.weight", f"{HEAD}.base_layer.weight")
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
Q_BIAS, K_BIAS = f"{Q}.base_layer.bias", f"{PREFIX}model.layers.0.self_attn.k_proj.bias"
OWN_BIAS = f"{HEAD}.lora_B.bias"


@pytest.fixture(scope="module")
def qwen2():
    return tiny_model(FAMILIES["qwen2"])


@pytest.fixture(scope="module")
def base(qwen2):
    return prepared(qwen2)


@pytest.fixture(scope="module")
def files(qwen2, tmp_path_factory):
    """The fields and tensors of an adapter that has everything."""
    directory = write_lora(
        qwen2,
        tmp_path_factory.mktemp("template"),
        r=3,
        bias="all",
        lora_bias=True,
        target_modules=["q_proj", "lm_head"],
    )
    fields = json.loads((directory / "adapter_config.json").read_text())
    tensors = load((directory / "adapter_model.safetensors").read_bytes())
    fields["target_modules"] = ["q_proj", "lm_head", "embed_tokens"]  # PEFT has no lora_bias there
    tensors[A], tensors[B] = torch.randn(3, VOCAB_SIZE), torch.randn(64, 3)
    tensors[COPIES[0]] = qwen2.get_input_embeddings().weight.detach()
    return fields, tensors


def parse(base, files, fields=None, **tensors):
    """The adapter of `files` with other `fields` and `tensors`, of which None takes one away."""
    config = json.dumps(files[0] | (fields or {})).encode()
    changed = files[1] | tensors
    weights = save({name: t.contiguous() for name, t in changed.items() if t is not None})
    ref = AdapterRef("acme/any", 1, content_digest(config, weights), "lora")
    return METHOD.parse(parse_checkpoint(config, weights, ref), base, BankOptions())


def test_the_undamaged_adapter_is_served_without_the_copies(base, files):
    adapter = parse(base, files)
    assert set(COPIES) < set(files[1])
    held = sum(tensor.numel() for name, tensor in files[1].items() if name not in COPIES)
    # Biases that lora_B has stand in one sum with the base's, but q_proj alone has both.
    assert adapter.num_parameters == held - 2 * 64
    assert set(adapter.weights) > {"model.embed_tokens", "lm_head"}
    assert {"lm_head", "model.layers.1.self_attn.v_proj"} < set(adapter.shifts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({A: None}, "embed_tokens.lora_embedding_B: its partner .lora_embedding_A is missing"),
        ({HEAD_B: None}, "lm_head.lora_A.weight: its partner .lora_B.weight is missing"),
        ({A: torch.ones(3, 299)}, r"lora_embedding_A: is \[3, 299\], the base needs \[rank, 300\]"),
        ({A: torch.ones(300, 3)}, r"lora_embedding_A: is \[300, 3\]"),
        ({B: torch.ones(3, 64)}, r"lora_embedding_B: is \[3, 64\], .* \[64, 3\]"),
        ({HEAD_B: torch.ones(301, 3)}, r"lm_head.lora_B.weight: is \[301, 3\], .* \[300, 3\]"),
        ({A: torch.full((3, 300), torch.nan)}, "lora_embedding_A' holds NaN"),
        ({Q_BIAS: torch.full((64,), torch.inf)}, "q_proj.base_layer.bias' holds infinity"),
        ({A: torch.ones(2, 300), B: torch.ones(64, 2)}, "lora_embedding_A: has rank 2, .* says 3"),
        ({A: None, B: None}, "targets model.embed_tokens .* no tensors"),
        (
            {f"{Q}.lora_embedding_A": torch.ones(3, 64), f"{Q}.lora_embedding_B": torch.ones(64, 3)},
            "q_proj.lora_embedding_A: its module is no target",
        ),
        ({COPIES[0]: torch.ones(300, 64)}, r"embed_tokens.base_layer.weight: is another weight"),
        ({COPIES[1]: torch.ones(301, 64)}, r"lm_head.base_layer.weight: is another weight.*save_embedding_l"),
        ({f"{HEAD}.weight": torch.ones(300, 64)}, r"lm_head.weight: is another weight"),
        ({f"{Q}.base_layer.weight": torch.ones(64, 64)}, "q_proj.base_layer.weight: is no part"),
        ({Q_BIAS: None}, "q_proj.base_layer.bias: is missing.*bias 'all'"),
        ({K_BIAS: None}, "k_proj.bias: is missing.*bias 'all'"),
        ({Q_BIAS: torch.ones(63)}, r"q_proj.base_layer.bias: is \[63\], the base needs \[64\]"),
        ({Q_BIAS: torch.ones(64, 1)}, r"q_proj.base_layer.bias: is \[64, 1\]"),
        ({f"{Q}.bias": torch.ones(64)}, "q_proj.bias: is no bias"),
        ({f"{HEAD}.base_layer.bias": torch.ones(300)}, "lm_head.base_layer.bias: is no bias"),
        ({f"{PREFIX}model.norm.bias": torch.ones(64)}, "model.norm.bias: is no bias"),
        ({OWN_BIAS: None}, "lm_head.lora_B.bias: is missing.*lora_bias"),
        ({OWN_BIAS: torch.ones(64)}, r"lm_head.lora_B.bias: is \[64\], the base needs \[300\]"),
        ({f"{EMBEDDING}.lora_B.bias": torch.ones(64)}, "embed_tokens.lora_B.bias: .* no place"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_named(base, files, change, message):
    with pytest.raises(AdapterInvalidError, match=message):
        parse(base, files, **change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "none"}, "bias: is no bias .*bias 'none'"),
        ({"bias": "lora_only"}, "k_proj.bias: is no bias .*bias 'lora_only'"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only"),
        ({"lora_bias": False}, "lora_B.bias: .*no place"),
        ({"use_dora": True}, "targets .* no tensors"),
        ({"target_modules": ["q_proj", "lm_head"]}, "embed_tokens.lora_embedding_A: its module is no target"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lm_head.lora_A.weight: its module is no target"),
        ({"target_modules": "all-linear"}, "no tensors"),
        ({"rank_pattern": {"embed_tokens": 5}}, "lora_embedding_A: has rank 3, .* says 5"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save .*embed_tokens.* is not served"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_are_named(base, files, fields, message):
    with pytest.raises(AdapterInvalidError, match=message):
        parse(base, files, fields)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_other_shape_is_refused_by_its_tensor(base, files, data):
    name = data.draw(st.sampled_from(sorted(files[1])))
    shape = tuple(data.draw(st.lists(st.integers(1, 65), min_size=1, max_size=3)))
    if shape == tuple(files[1][name].shape):
        return
    with pytest.raises(AdapterInvalidError, match=r"\.(lora_|base_layer|bias)"):
        parse(base, files, **{name: torch.ones(shape)})


def test_a_copy_in_half_precision_must_be_the_base_s_still(base, files, qwen2):
    copy = qwen2.get_input_embeddings().weight.detach()
    with pytest.raises(AdapterInvalidError, match=r"embed_tokens.base_layer.weight: is another weight"):
        parse(base, files, **{COPIES[0]: copy.bfloat16()})


def test_an_untied_base_and_one_without_biases_leave_such_fields_without_effect(llama, llama_base, tmp_path):
    directory = write_lora(llama, tmp_path, r=2, target_modules=["q_proj"])
    fields = json.loads((directory / "adapter_config.json").read_text())
    tensors = load((directory / "adapter_model.safetensors").read_bytes())
    adapter = parse(llama_base, (fields | {"bias": "all", "ensure_weight_tying": True}, tensors))
    assert not adapter.shifts
