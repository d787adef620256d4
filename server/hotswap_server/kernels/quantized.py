"""Linears whose weights stay as bitsandbytes packs them; the only file that imports it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes import matmul_4bit  # type: ignore[attr-defined]
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Linear8bitLt  # type: ignore[attr-defined]
from torch import nn

from hotswap_server.kernels.interface import FourBitWeight

_MAX_CHUNK = 128  # inputs of one scale, more of which a fused kernel would go through at once
_INT8_RANGE = 127.0  # a row's largest weight, its scale, is that many steps


class FourBitProjection:
    """A weight in NF4 or FP4 blocks (Dettmers et al., "QLoRA", 2023), unpacked in `dtype` at each use.

    `packed` is [weights / 2, 1], `state` has the scales of the blocks, themselves quantised where
    `state.nested`; fused kernels read both. `bias` is [out_features] or None.
    """

    def __init__(
        self, packed: torch.Tensor, state: QuantState, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        self.packed = packed
        self.state = copy.copy(state)
        self.state.dtype = dtype
        self.bias = bias
        # On a CPU with AVX-512 bitsandbytes takes every row to begin with a block.
        self._ragged = packed.device.type == "cpu" and state.shape[-1] % state.blocksize != 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._ragged:
            return F.linear(x, self.weight(), self.bias)
        out: torch.Tensor = matmul_4bit(x, self.packed, self.state, bias=self.bias)
        return out

    def weight(self) -> torch.Tensor:
        state = self.state
        if self._ragged:
            state = copy.copy(state)
            state.shape = torch.Size((1, self.state.shape.numel()))
        weight: torch.Tensor = dequantize_4bit(self.packed, state)
        return weight.view(self.state.shape)

    def resolved(self) -> FourBitWeight:
        """The same weight for fused kernels: its bytes shared, its scales in float32."""
        out_features, in_features = self.state.shape
        scales = self.state.absmax
        if self.state.nested:
            scales = dequantize_blockwise(scales, self.state.state2) + self.state.offset
        block = int(self.state.blocksize)
        chunk = min(math.gcd(in_features, block), _MAX_CHUNK)
        rows = torch.arange(out_features, device=scales.device)
        inputs = torch.arange(0, in_features, chunk, device=scales.device)
        blocks = (rows * in_features + inputs[:, None]) // block
        return FourBitWeight(
            packed=self.packed.view(torch.uint8).view(out_features, in_features // 2),
            scales=scales.float()[blocks],
            code=self.state.code.float(),
            values=tuple(self.state.code.tolist()),
            chunk=chunk,
            dtype=self.state.dtype,
        )

    @property
    def nbytes(self) -> int:
        return int(self.packed.nbytes) + self.scale_bytes

    @property
    def scale_bytes(self) -> int:
        """The memory of all scales in bytes; that of the weights is `packed.nbytes`."""
        states = [self.state, self.state.state2] if self.state.nested else [self.state]
        return sum(int(state.absmax.nbytes) for state in states)


class Int8Projection:
    """A weight in 8 bits with one step per output, as bitsandbytes stores it; inputs stay as they are.

    bitsandbytes' own product rounds the inputs to 8 bits as well and picks the columns that it spares from
    this by the whole batch (Dettmers et al., "LLM.int8()", 2022): a request would depend on its neighbours.

    `rows` is [out_features, in_features] int8, `steps` [out_features] float32 what a one in each row is
    worth, `bias` [out_features] or None.
    """

    def __init__(
        self, rows: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        self.rows = rows
        self.steps = steps
        self.bias = bias
        self._dtype = dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float16:  # whose range ends below sums of unscaled products
            return F.linear(x, self.weight(), self.bias)
        out = F.linear(x, self.rows.to(x.dtype)).mul_(self.steps)
        return out if self.bias is None else out.add_(self.bias)

    def weight(self) -> torch.Tensor:
        return self.rows.to(self._dtype).mul_(self.steps[:, None])

    def resolved(self) -> None:
        """It is not in 4 bits."""

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.scale_bytes

    @property
    def scale_bytes(self) -> int:
        return self.steps.nbytes


def quantized_projection(linear: nn.Module, dtype: torch.dtype) -> FourBitProjection | Int8Projection | None:
    """The projection of one of bitsandbytes' linears, sharing its memory; None of any other module."""
    weight: Any = getattr(linear, "weight", None)
    bias: Any = getattr(linear, "bias", None)
    bias = None if bias is None else bias.data.to(dtype)
    if isinstance(linear, Linear4bit):
        return FourBitProjection(weight.data, weight.quant_state, bias, dtype)
    if isinstance(linear, Linear8bitLt):
        # The first forward moves the scales from the weight to the module's state.
        scales: Any = weight.SCB if weight.SCB is not None else linear.state.SCB
        return Int8Projection(weight.data, scales.float() / _INT8_RANGE, bias, dtype)
    return None
