"""Tiny bases of several architectures with a bottleneck adapter that matters."""

from __future__ import annotations

import torch
from hotswap_trainer.methods.bottleneck.tuner import BottleneckConfig
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

HIDDEN = 16
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
}
IDS = torch.tensor([[1, 5, 9, 13, 17], [2, 3, 4, 6, 7]])


def make_base(kind="llama"):
    config, model, options = MODELS[kind]
    torch.manual_seed(0)
    return model(
        config(
            vocab_size=24,
            hidden_size=HIDDEN,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **options,
        )
    ).eval()


def adapt(base, seed=1, adapter="default", **options):
    """A PEFT model whose adapter has weights that matter."""
    options = {"bottleneck_size": 4, **options}
    model = get_peft_model(base, BottleneckConfig(task_type="CAUSAL_LM", **options), adapter_name=adapter)
    randomise(model, adapter, seed)
    return model


def randomise(model, adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"_adapter.{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def saved(model, directory):
    model.save_pretrained(directory, save_embedding_layers=False)
    return load_file(directory / "adapter_model.safetensors")
