"""Bases that transformers and bitsandbytes quantise, and PEFT over them as the oracle."""

from functools import partial
from pathlib import Path

import bitsandbytes
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from support.adapters import Oracle


def quantize(
    directory: Path, kind: str, dtype: torch.dtype = torch.float32, *, skip: list[str] | None = None
) -> nn.Module:
    """The model of `directory` as a user of QLoRA gets it; 8 bits with bitsandbytes' own settings."""
    config = BitsAndBytesConfig(load_in_8bit=True)
    if kind != "int8":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        )
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
    )
    model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # Else a CPU with bfloat16 units computes float32 products in bfloat16, and one with AVX-512
            # unpacks rows that do not begin with a block to something else.
            module.support_avx512bf16_for_cpu = False
            if module.in_features % module.weight.quant_state.blocksize:
                module.forward = partial(_by_definition, module)
    return model.eval()


def _by_definition(linear: bitsandbytes.nn.Linear4bit, x: torch.Tensor) -> torch.Tensor:
    weight = unpacked(linear.weight.data, linear.weight.quant_state).to(x.dtype)
    return nn.functional.linear(x, weight, linear.bias)


def unpacked(packed: torch.Tensor, state: bitsandbytes.functional.QuantState) -> torch.Tensor:
    """The weight by its definition, in float32: blocks follow one another whatever the rows."""
    scales = state.absmax
    if state.nested:
        scales = bitsandbytes.functional.dequantize_blockwise(scales, state.state2) + state.offset
    packed = packed.flatten()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten().int()
    values = state.code[codes] * scales.repeat_interleave(state.blocksize)[: len(codes)]
    return values.view(state.shape)


class QuantizedOracle(Oracle):
    """PEFT over such a model. In 8 bits bitsandbytes multiplies inputs as they are, as in training on a CPU:
    in inference it rounds them to 8 bits too, by rules that look at the whole batch."""

    def __init__(self, model: nn.Module, directories: dict[str, Path]) -> None:
        super().__init__(model, directories)
        if self._peft is not None:
            for linear, original in zip(_int8(self._peft), _int8(model), strict=True):
                weight, state = original.weight, original.state
                scales = weight.SCB if weight.SCB is not None else state.SCB
                linear.register_forward_pre_hook(partial(_give_scales, scales))

    def model(self, adapter: str | None) -> nn.Module:
        model = super().model(adapter)
        for linear in _int8(model):
            linear.train()
        return model


def _give_scales(scales: torch.Tensor, linear: bitsandbytes.nn.Linear8bitLt, args: object) -> None:
    """PEFT 0.21's DoRA loses the scales of an 8-bit weight at each forward, and fails in the next."""
    linear.weight.CB = linear.weight.SCB = None
    linear.state.CB, linear.state.SCB = linear.weight.data, scales


def _int8(model: nn.Module) -> list[bitsandbytes.nn.Linear8bitLt]:
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)]
