"""Bases in 4 or 8 bits: how one is loaded, and its linears taken over from bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from hotswap_server.errors import BaseModelError, InvalidRequestError

if TYPE_CHECKING:
    from hotswap_server.kernels.quantized import FourBitProjection, Int8Projection

QUANTIZATIONS: Final = ("nf4", "fp4", "int8")


class QuantizedLinear(nn.Module):
    """Stands where one of bitsandbytes' linears stood, until it joins a group of projections."""

    def __init__(self, linear: nn.Linear, projection: FourBitProjection | Int8Projection) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = None if projection.bias is None else nn.Parameter(projection.bias, requires_grad=False)
        self.projection = projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x)


def quantization_arguments(
    path: Path, quantize: str | None, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What `from_pretrained` needs so that the base in `path` is held as `quantize` says, or as it is stored.

    Raises:
        InvalidRequestError: `quantize` is unknown, needs packages that are missing, or the base is stored in
            another kind.
        BaseModelError: the base is stored in a quantisation that is not served.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise InvalidRequestError(
            "quantize", f"must be one of {', '.join(QUANTIZATIONS)}, got {quantize!r}; or leave it out"
        )
    stored = _stored_quantization(path)
    if quantize is not None and stored not in (None, quantize):
        raise InvalidRequestError("quantize", f"the base is stored in {stored} already; leave the option out")
    kind = stored or quantize
    if kind is None:
        return {}
    _check_packages(kind)
    arguments: dict[str, Any] = {"device_map": {"": device}}
    if stored is None:
        arguments["quantization_config"] = _configuration(kind, dtype)
    return arguments


def quantization_of(config: Any) -> str | None:
    """The kind that a model's configuration is of, one of `QUANTIZATIONS`, None of a plain model's.

    Raises:
        BaseModelError: it is of none that is served.
    """
    given = getattr(config, "quantization_config", None)
    return None if given is None else _kind_of(given if isinstance(given, dict) else given.to_dict())


def take_over(model: nn.Module, kind: str, dtype: torch.dtype) -> int:
    """Put a `QuantizedLinear` in the place of every one of bitsandbytes' linears, sharing their weights.

    Gives the bytes of the weights' scales, which are no parameters of the model.

    Raises:
        BaseModelError: there are none, or 4 bits cannot hold one of them.
    """
    from hotswap_server.kernels.quantized import quantized_projection

    scale_bytes = 0
    for name, module in list(model.named_modules()):
        projection = quantized_projection(module, dtype)
        if projection is None or not isinstance(module, nn.Linear):
            continue
        if kind != "int8" and module.in_features % 2:
            raise BaseModelError(
                f"base: {name} has {module.in_features} inputs, an odd number, whose rows do not end with a "
                "byte in 4 bits; quantise to int8, or not at all"
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizedLinear(module, projection))
        scale_bytes += projection.scale_bytes
    if not scale_bytes:
        raise BaseModelError(
            f"base: {type(model).__name__} has no linear layer that bitsandbytes would hold in {kind}; "
            "serve it without quantising"
        )
    return scale_bytes


def _configuration(kind: str, dtype: torch.dtype) -> Any:
    """The settings of `hotswap train --method qlora`, so that both see the same weights."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _check_packages(kind: str) -> None:
    try:
        import accelerate  # type: ignore[import-untyped]  # noqa: F401
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise InvalidRequestError(
            "quantize",
            f"a base in {kind} needs bitsandbytes and accelerate ({error}); pip install 'hotswap[server]'",
        ) from error


def _stored_quantization(path: Path) -> str | None:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # transformers says what is wrong with it
    given = config.get("quantization_config") if isinstance(config, dict) else None
    return _kind_of(given) if isinstance(given, dict) else None


def _kind_of(config: dict[str, Any]) -> str:
    if config.get("load_in_8bit"):
        return "int8"
    if config.get("load_in_4bit"):
        return str(config.get("bnb_4bit_quant_type", "fp4"))
    raise BaseModelError(
        f"base: it is stored in quant_method {config.get('quant_method')!r}, which is not served; "
        "use one that bitsandbytes wrote, or one in full precision"
    )
