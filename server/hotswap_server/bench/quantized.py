"""The steps of `hotswap bench --shape` over a base in 4 bits, quantised where it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from hotswap_server.bench.shapes import random_model
from hotswap_server.bench.steps import StepBench, fill_loras, measure_grid
from hotswap_server.bench.workload import ALL_LINEAR
from hotswap_server.engine.base import prepare_base
from hotswap_server.engine.compiling import compile_layers
from hotswap_server.kernels import select_kernels

KIND = "nf4"


def measure_quantized(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    context: int,
    rank: int,
    eager: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Steps without and with LoRAs, and the bytes of the weights; nothing where bitsandbytes is missing."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return {"missing": str(error)}
    tell(f"quantising the base to {KIND}")
    model = random_model(shape, device=device, dtype=dtype)
    quantize_linears(model, dtype)
    base = prepare_base(model, kernels=select_kernels(device, dtype))
    if not eager and base.state.kernels.can_be_recorded:
        compile_layers(base)
    bench = StepBench(base, context, 64)
    tell(f"base in {KIND}")
    for batch in (1, 8, 32, 64):
        bench.decode(f"base in {KIND}", batch)
    bench.prefill(f"prompts, {KIND}", 16)
    tell(f"LoRAs over {KIND}")
    measure_grid(bench, f"{KIND}, LoRA r={rank} all", "lora", fill_loras(base, 32, rank, ALL_LINEAR))
    base.detach_adapters()
    return {"weight_bytes": bench.weight_bytes, "steps": [asdict(step) for step in bench.times]}


def quantize_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """What transformers makes of `model` for `--quantize nf4`: all linears but the head, double quantised."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]

    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is head:
            continue
        device = module.weight.device
        made: Any = Linear4bit(  # type: ignore[no-untyped-call]
            module.in_features, module.out_features, bias=False, compute_dtype=dtype, device="meta"
        )
        weight: Any = Params4bit(
            module.weight.data,
            requires_grad=False,
            quant_type=KIND,
            compress_statistics=True,
        )
        made.weight = weight.to(device)
        made.bias = module.bias
        module.register_parameter("weight", None)  # before the next: both do not fit beside one another
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    config: Any = model.config
    config.quantization_config = {"load_in_4bit": True, "bnb_4bit_quant_type": KIND}
