"""Bases of a known shape with random weights, and random adapters for them, made where they are measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from hotswap.shapes import SHAPES
from torch import nn

from hotswap_server.adapters.methods.bottleneck import BottleneckAdapter, BottleneckWeights
from hotswap_server.adapters.methods.ia3 import Ia3Adapter
from hotswap_server.adapters.methods.lora.adapter import LoraAdapter
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.prefixes import Prefix
from hotswap_server.kernels import Activation, BottleneckLayout

_STD = 0.02


def random_model(shape: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A Llama of `shape`, an entry of SHAPES."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with device:
        config = LlamaConfig(**SHAPES[shape])
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.eval()
    return cast(nn.Module, model)


def random_lora(base: BaseModel, rank: int, targets: Sequence[str]) -> LoraAdapter:
    weights = {
        name: (_random(base, rank, in_features), _random(base, rank, out_features))
        for name, (out_features, in_features) in base.linear_shapes.items()
        if name.endswith(tuple(targets))
    }
    nbytes = sum(a.nbytes + b.nbytes for a, b in weights.values())
    return LoraAdapter(weights, {}, {}, nbytes, 0, {})


def random_bottleneck(base: BaseModel, size: int) -> BottleneckAdapter:
    weights = {
        f"{block.layer}.{block.place}_adapter": BottleneckWeights(
            down=_random(base, size, block.hidden_size),
            down_bias=_random(base, size),
            up=_random(base, size, block.hidden_size),
            up_bias=_random(base, block.hidden_size),
        )
        for block in base.blocks
    }
    nbytes = sum(entry.nbytes for entry in weights.values())
    return BottleneckAdapter(weights, Activation.RELU, BottleneckLayout.HOULSBY, True, nbytes, 0, {})


def random_ia3(base: BaseModel) -> Ia3Adapter:
    """On keys, values and, before it, the MLP's output, as PEFT has it for a Llama."""
    outputs, inputs = {}, {}
    for name, (out_features, in_features) in base.linear_shapes.items():
        if name.endswith(("k_proj", "v_proj")):
            outputs[name] = 1 + _random(base, out_features)
        elif name.endswith("down_proj"):
            inputs[name] = 1 + _random(base, in_features)
    nbytes = sum(scale.nbytes for scale in (*outputs.values(), *inputs.values()))
    return Ia3Adapter(outputs, inputs, nbytes, 0, {})


def random_prefix(base: BaseModel, tokens: int, digest: str) -> Prefix:
    def rows() -> tuple[torch.Tensor, ...]:
        return tuple(_random(base, site.kv_heads, tokens, site.head_dim) for site in base.attention)

    return Prefix(digest, rows(), rows())


def _random(base: BaseModel, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=base.dtype, device=base.device) * _STD
