"""The rule of thumb: what a method needs, by the number of parameters alone. No library is imported.

The formulas are those of "Full Fine-Tuning vs Parameter-Efficient Fine-Tuning", lesson 3 of a course on
fine-tuning, kept as they are; `docs/planning.md` lists where they are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from hotswap_trainer.errors import OptionError
from hotswap_trainer.planning.options import COMPLEXITIES, DTYPES, OPTIMIZERS
from hotswap_trainer.planning.units import GIB

_WIDTH: Final = {"bf16": 2, "fp32": 4}
_OPTIMIZER: Final = {"adamw": 8, "adamw8bit": 2, "sgd": 0}
# The lesson counts 8 bytes for SGD in bfloat16; what it lists of them adds up to 6.
_LESSON_TOTAL: Final = {("bf16", "adamw"): 14, ("fp32", "adamw"): 20, ("bf16", "sgd"): 8}

_LORA_GB_PER_BILLION: Final = 2.0
_QLORA_GB_PER_BILLION: Final = 0.6
_ADAPTER_GB: Final = 2.0  # "for adapters and activations"
RANKS: Final = {"simple": 8, "moderate": 16, "complex": 32}


@dataclass(frozen=True, slots=True)
class RuleEstimate:
    """Training memory of a method in GB by component; `unnamed` is what the rule counts and does not name."""

    method: str
    total: float
    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    unnamed: float = 0.0


def full_memory(billions: float, dtype: str = "bf16", optimizer: str = "adamw") -> RuleEstimate:
    """Full fine-tuning: so many bytes per parameter of weights, gradients, optimizer and activations.

    Combinations that the lesson does not list, for which it would silently give AdamW in bfloat16, are made
    of the same parts.

    Raises:
        OptionError: a size, type or optimizer that there is not.
    """
    _check_size(billions)
    _check("dtype", dtype, DTYPES)
    _check("optimizer", optimizer, OPTIMIZERS)
    width, states = _WIDTH[dtype], _OPTIMIZER[optimizer]
    named = 3 * width + states
    total = _LESSON_TOTAL.get((dtype, optimizer), named)
    gb = billions * 1e9 / GIB
    return RuleEstimate(
        "full", total * gb, width * gb, width * gb, states * gb, width * gb, (total - named) * gb
    )


def adapter_memory(method: str, billions: float) -> RuleEstimate:
    """`lora`: 2 GB per billion parameters of the base and 2 GB; `qlora`: 0.6 and 2.

    The lesson has no figure for `bottleneck` and `prefix`, whose base is held as LoRA's is: they get LoRA's.
    """
    _check_size(billions)
    per_billion = _QLORA_GB_PER_BILLION if method == "qlora" else _LORA_GB_PER_BILLION
    weights = billions * per_billion
    return RuleEstimate(method, weights + _ADAPTER_GB, weights, unnamed=_ADAPTER_GB)


def lesson_hardware(gb: float) -> str:
    """The lesson's suggestion. Above 160 GB it rounds the number of cards down, so they are too few."""
    if gb <= 24:
        return "RTX 4090 (24 GB)"
    if gb <= 48:
        return "2x RTX 4090 or A6000 (48 GB)"
    if gb <= 80:
        return "A100 80GB (single GPU)"
    if gb <= 160:
        return "2x A100 80GB"
    return f"{int(gb / 80)} x A100 80GB (multi-node)"


def recommend(billions: float, gpu_gb: float, complexity: str, multiple_tasks: bool) -> dict[str, Any]:
    """The lesson's recommendation: the first that applies. So several tasks never change what fits anyway.

    Raises:
        OptionError: a size or complexity that there is not.
    """
    _check_size(billions)
    _check("complexity", complexity, COMPLEXITIES)
    if adapter_memory("lora", billions).total <= gpu_gb:
        return {
            "method": "LoRA",
            "rank": RANKS[complexity],
            "reason": "Base model fits in memory; fastest training",
        }
    if adapter_memory("qlora", billions).total <= gpu_gb and billions > 7:
        return {
            "method": "QLoRA",
            "rank": 16,
            "reason": "Model too large for bf16 LoRA; 4-bit quantization enables training",
        }
    if multiple_tasks:
        return {
            "method": "Adapter Layers",
            "bottleneck": 64,
            "reason": "Adapters can be hot-swapped for different tasks at inference time",
        }
    return {"method": "none", "reason": "Model too large even for QLoRA on this hardware"}


def lora_parameters(in_features: int, out_features: int, rank: int) -> int:
    """Of one linear layer: A is `[rank, in]`, B is `[out, rank]`."""
    return rank * in_features + out_features * rank


def bottleneck_parameters(hidden_size: int, bottleneck_size: int) -> int:
    """Of one Houlsby adapter, of which a layer has two: down, up, and a bias of each one's own width."""
    return 2 * hidden_size * bottleneck_size + bottleneck_size + hidden_size


def prefix_parameters(num_layers: int, num_kv_heads: int, head_dim: int, length: int) -> int:
    """Keys and values of `length` tokens, for heads that have keys of their own (grouped queries share)."""
    return num_layers * 2 * length * num_kv_heads * head_dim


def _check(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"--{field}: must be one of {', '.join(allowed)}; got {value!r}")


def _check_size(billions: float) -> None:
    if not 0 < billions < float("inf"):
        raise OptionError(f"--base: must have over 0 parameters, got {billions} billion")
