"""A stand-in for bitsandbytes' 4-bit linears: of their sizes, with no numbers in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 64  # weights that share a scale
_SCALES_BLOCK = 256  # scales that share one in turn
_TABLE = 256 + 16 + 1  # float32 numbers of a layer: the code of scales, that of weights, the scales' mean


class FourBitLinear(nn.Linear):
    """Of the memory and the temporaries of `bitsandbytes.nn.Linear4bit`, NF4 with quantised scales.

    `weight` is packed, [weights / 2, 1]; each product unpacks it, and so does its gradient, which keeps
    neither the unpacked weight nor the input (Dettmers et al., "QLoRA", https://arxiv.org/abs/2305.14314).
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.empty((linear.weight.numel() + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    @property
    def constants(self) -> int:
        """Bytes of scales and of their tables."""
        return scale_bytes(self.in_features * self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        out: Tensor = _Product.apply(input, shape)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)


def scale_bytes(weights: int) -> int:
    """Bytes of the quantisation constants of a matrix of so many weights."""
    blocks = -(-weights // _BLOCK)
    return blocks + 4 * -(-blocks // _SCALES_BLOCK) + 4 * _TABLE


def quantise(model: nn.Module) -> None:
    """Put stand-ins for all linears but the output layer, as `from_pretrained` does with `load_in_4bit`."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not output:
                setattr(parent, name, FourBitLinear(child))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return input @ input.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape), None
