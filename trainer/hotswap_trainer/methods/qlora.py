"""QLoRA: LoRA over a base that is held in 4 bits (https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from hotswap_trainer.errors import OptionError
from hotswap_trainer.methods.lora import LoraMethod, LoraOptions
from hotswap_trainer.options import option

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class QLoraOptions(LoraOptions):
    """Options of LoRA, and how the base's linear layers are quantised."""

    quant_type: Literal["nf4", "fp4"] = option("nf4", help="4-bit number format of the base.")
    double_quant: bool = option(True, help="Quantise the scales of the 4-bit blocks as well.")
    quant_compute_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", help="What weights are dequantised to for a product; auto is --dtype."
    )


class QLora(LoraMethod[QLoraOptions]):
    """The decoder's linear layers are held in 4 bits by bitsandbytes; embeddings, norms and the output layer
    stay as they are. What is published is an ordinary LoRA, which fits the base in any precision and does
    best over the same 4 bits.

    On a CPU bitsandbytes dequantises each weight at each use: it saves memory and costs time.
    """

    name = "qlora"
    summary = "LoRA over a base in 4 bits"
    learning_rate = 2e-4
    options = QLoraOptions

    def base_arguments(self, options: QLoraOptions, dtype: torch.dtype) -> dict[str, Any]:
        import torch
        from transformers import BitsAndBytesConfig

        chosen = options.quant_compute_dtype
        quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=options.quant_type,
            bnb_4bit_use_double_quant=options.double_quant,
            bnb_4bit_compute_dtype=dtype if chosen == "auto" else getattr(torch, chosen),
        )
        return {"dtype": dtype, "quantization_config": quantization}

    def attach(self, model: PreTrainedModel, options: QLoraOptions) -> Any:
        from peft import prepare_model_for_kbit_training

        if not getattr(model, "is_loaded_in_4bit", False):
            raise OptionError("--method: qlora needs a base that bitsandbytes can hold in 4 bits")
        _compute_as_trained(model)
        # The run itself turns gradient checkpointing on.
        prepared = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=False
        )
        return super().attach(prepared, options)


def _compute_as_trained(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from what it does on CPUs with AVX-512 alone.

    To evaluate in bfloat16 it repacks weights, in a form that does not fit every layer and that training goes
    on in. And it takes rows to begin with a block, so that others are unpacked to something else.
    """
    from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]

    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for module in layers:
        if module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False
            if module.in_features % module.weight.quant_state.blocksize:
                module.forward = partial(_forward, module)


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What `layer` computes, its weight unpacked as one row."""
    import torch.nn.functional as F
    from bitsandbytes.functional import dequantize_4bit

    state = copy(layer.weight.quant_state)
    shape, state.shape = state.shape, (1, state.shape.numel())
    weight = dequantize_4bit(layer.weight.data, state).view(shape)
    dtype = layer.compute_dtype or x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)


METHOD = QLora()
