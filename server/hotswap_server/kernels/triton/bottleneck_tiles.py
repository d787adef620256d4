"""Bottleneck adapters of many tokens, by tiles as LoRA's: a narrow product, the activation, a wide one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hotswap_server.kernels.interface import BottleneckTable
from hotswap_server.kernels.triton.activations import activate
from hotswap_server.kernels.triton.token_tiles import MIN_ROWS, RANKS, precision, splits_of, tile_at


@triton.jit
def _down_kernel(
    x,
    stream,
    down,
    sizes,
    layouts,
    tiles,
    hidden,
    x_stride,
    stream_stride,
    tile_stride,
    field_stride,
    split_stride,
    WIDTH: tl.constexpr,
    MAX_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    first_rank = tl.program_id(1) * RANKS
    split = tl.program_id(2)
    start, count, slot = tile_at(tiles, tile, tile_stride, field_stride)
    if count > 0:
        size = tl.load(sizes + slot)
        if first_rank < size:
            layout = tl.load(layouts + slot)
            SHARE: tl.constexpr = ((WIDTH + SPLITS - 1) // SPLITS + BLOCK - 1) // BLOCK * BLOCK
            row = tl.arange(0, ROWS)
            r = first_rank + tl.arange(0, RANKS)
            weight_rows = down + (slot * MAX_SIZE + r)[:, None] * WIDTH
            result = tl.zeros([ROWS, RANKS], tl.float32)
            for begin in range(split * SHARE, split * SHARE + SHARE, BLOCK):
                k = begin + tl.arange(0, BLOCK)
                inside = (row < count)[:, None] & (k < WIDTH)[None, :]
                # Layouts: 0 reads x, 1 both, 2 the residual stream.
                own = tl.load(
                    x + (start + row)[:, None] * x_stride + k[None, :], mask=inside & (layout < 2), other=0.0
                )
                passing = tl.load(
                    stream + (start + row)[:, None] * stream_stride + k[None, :],
                    mask=inside & (layout > 0),
                    other=0.0,
                )
                weights = tl.load(
                    weight_rows + k[None, :], mask=(r < size)[:, None] & (k < WIDTH)[None, :], other=0.0
                )
                result += tl.dot(own + passing, tl.trans(weights), input_precision=PRECISION)
            there = split * split_stride + (start + row)[:, None] * MAX_SIZE + r[None, :]
            tl.store(hidden + there, result, mask=(row < count)[:, None] & (r < size)[None, :])


@triton.jit
def _up_kernel(
    hidden,
    down_bias,
    up,
    up_bias,
    sizes,
    activations,
    residuals,
    tiles,
    x,
    x_stride,
    tile_stride,
    field_stride,
    split_stride,
    WIDTH: tl.constexpr,
    MAX_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    start, count, slot = tile_at(tiles, tile, tile_stride, field_stride)
    if count > 0:
        size = tl.load(sizes + slot)
        if size > 0:
            activation = tl.load(activations + slot)
            residual = tl.load(residuals + slot)
            row = tl.arange(0, ROWS)
            n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            columns = (n < WIDTH)[None, :]
            wanted = (row < count)[:, None] & columns
            there = x + (start + row)[:, None] * x_stride + n[None, :]
            result = tl.load(there, mask=wanted & (residual != 0), other=0.0).to(tl.float32)
            result += tl.load(up_bias + slot * WIDTH + n, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
            for first_rank in range(0, size, RANKS):
                r = first_rank + tl.arange(0, RANKS)
                weights = tl.load(
                    up + (slot * MAX_SIZE + r)[:, None] * WIDTH + n[None, :],
                    mask=(r < size)[:, None] & columns,
                    other=0.0,
                )
                bias = tl.load(down_bias + slot * MAX_SIZE + r, mask=r < size, other=0.0).to(tl.float32)
                narrow = (start + row)[:, None] * MAX_SIZE + r[None, :]
                inside = (row < count)[:, None] & (r < size)[None, :]
                low = tl.zeros([ROWS, RANKS], tl.float32) + bias[None, :]
                for split in tl.static_range(SPLITS):
                    low += tl.load(hidden + split * split_stride + narrow, mask=inside, other=0.0)
                low = tl.where(inside, activate(low, activation), 0.0)
                result += tl.dot(low.to(weights.dtype), weights, input_precision=PRECISION)
            tl.store(there, result.to(x.dtype.element_ty), mask=wanted)


def bottleneck(
    stream: torch.Tensor, x: torch.Tensor, table: BottleneckTable, tiles: torch.Tensor, rows: int
) -> None:
    """See `Kernels.bottleneck`."""
    _, max_size, width = table.down.shape
    splits = splits_of(tiles.shape[0] * triton.cdiv(max_size, RANKS), width)
    hidden = torch.empty(splits, x.shape[0], max_size, dtype=torch.float32, device=x.device)
    common = {
        "WIDTH": width,
        "MAX_SIZE": max_size,
        "ROWS": max(rows, MIN_ROWS),
        "RANKS": RANKS,
        "SPLITS": splits,
        "PRECISION": precision(x.dtype),
        "num_warps": 4,
    }
    _down_kernel[(tiles.shape[0], triton.cdiv(max_size, RANKS), splits)](
        x,
        stream,
        table.down,
        table.sizes,
        table.layouts,
        tiles,
        hidden,
        x.stride(0),
        stream.stride(0),
        tiles.stride(0),
        tiles.stride(1),
        hidden.stride(0),
        BLOCK=128 if x.dtype != torch.float32 else 64,
        num_stages=3,
        **common,
    )
    block = 64
    _up_kernel[(tiles.shape[0], triton.cdiv(width, block))](
        hidden,
        table.down_bias,
        table.up,
        table.up_bias,
        table.sizes,
        table.activations,
        table.residuals,
        tiles,
        x,
        x.stride(0),
        tiles.stride(0),
        tiles.stride(1),
        hidden.stride(0),
        BLOCK=block,
        num_stages=2,
        **common,
    )
