"""Made-up adapters of a typical size, to measure with: what an adapter says does not change what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from hotswap_server.adapters.fields import MODULE_PREFIX
from hotswap_server.adapters.method import BankOptions
from hotswap_server.engine.base import BaseModel

LORA_RANK: Final = 16
BOTTLENECK_SIZE: Final = 64
PREFIX_TOKENS: Final = 20

_STD = 0.02

Content = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""An `adapter_config.json` and its tensors."""


def typical(method: str, base: BaseModel, options: BankOptions) -> Content | None:
    """An adapter of `method` within `options`; None if the base has nothing that it could change.

    LoRA on all linear layers of the decoder, a bottleneck after attention and MLP, a prefix, and IA³ on keys,
    values and the MLP's output.
    """
    targets = tuple(sorted({name.rpartition(".")[2] for name in base.linear_shapes}))
    makers: Mapping[str, Callable[[], Content]] = {
        "lora": lambda: lora(base, min(LORA_RANK, options.max_lora_rank), targets),
        "bottleneck": lambda: bottleneck(base, min(BOTTLENECK_SIZE, options.max_bottleneck_size)),
        "prefix": lambda: prefix(base, min(PREFIX_TOKENS, options.max_prefix_tokens)),
        "ia3": lambda: ia3(base),
    }
    if method not in makers:
        return None
    config, tensors = makers[method]()
    return (config, tensors) if tensors else None


def lora(base: BaseModel, rank: int, targets: tuple[str, ...]) -> Content:
    tensors = {}
    for name, (out_features, in_features) in _targeted(base, targets).items():
        tensors[f"{MODULE_PREFIX}{name}.lora_A.weight"] = _random(rank, in_features)
        tensors[f"{MODULE_PREFIX}{name}.lora_B.weight"] = _random(out_features, rank)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    return config, tensors


def bottleneck(base: BaseModel, size: int) -> Content:
    tensors = {}
    for block in base.blocks:
        prefix, hidden = f"{MODULE_PREFIX}{block.layer}.{block.place}_adapter", block.hidden_size
        tensors[f"{prefix}.down.weight"] = _random(size, hidden)
        tensors[f"{prefix}.down.bias"] = _random(size)
        tensors[f"{prefix}.up.weight"] = _random(hidden, size)
        tensors[f"{prefix}.up.bias"] = _random(hidden)
    config = {
        "peft_type": "BOTTLENECK",
        "bottleneck_size": size,
        "activation": "relu",
        "layout": "houlsby",
        "after_attention": True,
        "after_mlp": True,
        "residual": True,
        "scaling": 1.0,
    }
    return config, tensors


def prefix(base: BaseModel, tokens: int) -> Content:
    site = base.attention[0]
    width = site.kv_heads * site.head_dim
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": tokens,
        "num_layers": len(base.attention),
        "num_attention_heads": site.kv_heads,
        "token_dim": width,
        "num_transformer_submodules": 1,
    }
    return config, {"prompt_embeddings": _random(tokens, len(base.attention) * 2 * width)}


def ia3(base: BaseModel) -> Content:
    targets, inputs = ("k_proj", "v_proj", "down_proj"), ("down_proj",)
    tensors = {}
    for name, (out_features, in_features) in _targeted(base, targets).items():
        shape = (1, in_features) if name.endswith(inputs) else (out_features, 1)
        tensors[f"{MODULE_PREFIX}{name}.ia3_l"] = 1.0 + _random(*shape)
    config = {"peft_type": "IA3", "target_modules": list(targets), "feedforward_modules": list(inputs)}
    return config, tensors


def _targeted(base: BaseModel, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in base.linear_shapes.items() if name.endswith(targets)}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * _STD
