"""Bottleneck adapters of a few tokens: bound by reading the weights, once for a tile of tokens.

The down-projection is cut over its input into parts, which are summed where they are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hotswap_server.kernels.interface import BottleneckTable, PendingExpand
from hotswap_server.kernels.triton.activations import activate
from hotswap_server.kernels.triton.early import early, start_next, wait_for_previous
from hotswap_server.kernels.triton.lora_rows import wide
from hotswap_server.kernels.triton.row_tiles import RANKS, parts_at, parts_of
from hotswap_server.kernels.triton.token_tiles import tile_at

_PART = 512  # inputs that a program of the down-projection goes through
_DOWN_WARPS = 4
_SIZES, _UP_BLOCK, _UP_WARPS = 64, 64, 2  # rows of an up-projection at a time, and its columns
_LORA_BLOCK = 128  # more, and registers keep the programs of the up-projections from starting early


@triton.jit
def _down_kernel(
    x,
    stream,
    tiles,
    tile_stride,
    field_stride,
    down,
    sizes,
    layouts,
    hidden,
    x_stride,
    stream_stride,
    WIDTH: tl.constexpr,
    MAX_SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    EARLY: tl.constexpr,
):
    start_next(EARLY)
    tile = tl.program_id(0)
    first = tl.program_id(1) * RANKS
    part = tl.program_id(2)
    start, count, slot = tile_at(tiles, tile, tile_stride, field_stride)
    if count > 0:
        size = tl.load(sizes + slot)
        if (first == 0) | (first < size):
            layout = tl.load(layouts + slot)
            k = part * PART + tl.arange(0, PART)
            r = first + tl.arange(0, RANKS)
            inside = (r < MAX_SIZE)[:, None] & (k < WIDTH)[None, :]
            rows = down + (slot * MAX_SIZE + r)[:, None] * WIDTH
            weights = tl.load(rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
            wait_for_previous(EARLY)
            # Layouts: 0 reads x, 1 both, 2 the residual stream.
            reads_x, reads_stream = (k < WIDTH) & (layout < 2), (k < WIDTH) & (layout > 0)
            own = tl.load(x + start * x_stride + k, mask=reads_x, other=0.0)
            passing = tl.load(stream + start * stream_stride + k, mask=reads_stream, other=0.0)
            for token in range(start, start + count):
                given = own.to(tl.float32) + passing.to(tl.float32)
                more = token + 1 < start + count  # is on its way while this one is computed
                own = tl.load(x + (token + 1) * x_stride + k, mask=reads_x & more, other=0.0)
                passing = tl.load(
                    stream + (token + 1) * stream_stride + k, mask=reads_stream & more, other=0.0
                )
                sums = tl.sum(weights * given[None, :], 1)
                tl.store(hidden + (token * PARTS + part) * MAX_SIZE + r, sums, mask=r < size)
        else:
            wait_for_previous(EARLY)
    else:
        wait_for_previous(EARLY)


@triton.jit
def _up(
    start,
    count,
    slot,
    block,
    hidden,
    down_bias,
    up,
    up_bias,
    sizes,
    activations,
    residuals,
    x,
    x_stride,
    WIDTH: tl.constexpr,
    MAX_SIZE: tl.constexpr,
    SIZES: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    size = tl.load(sizes + slot)
    activation = tl.load(activations + slot)
    residual = tl.load(residuals + slot)
    n = block * BLOCK + tl.arange(0, BLOCK)
    shift = tl.load(up_bias + slot * WIDTH + n, mask=n < WIDTH, other=0.0).to(tl.float32)
    r = tl.arange(0, SIZES)
    rows = up + slot * MAX_SIZE * WIDTH + n[None, :]
    biases = down_bias + slot * MAX_SIZE
    inside = (r < MAX_SIZE)[:, None] & (n < WIDTH)[None, :]
    weights = tl.load(rows + r[:, None] * WIDTH, mask=inside, other=0.0)
    bias = tl.load(biases + r, mask=r < size, other=0.0).to(tl.float32)
    wait_for_previous(EARLY)
    later = tl.load(x + start * x_stride + n, mask=n < WIDTH, other=0.0)
    later_parts = parts_at(hidden, start * PARTS * MAX_SIZE, r, size, PARTS, PARTS_PAD, MAX_SIZE)
    for token in range(start, start + count):
        own = x + token * x_stride + n
        at = token * PARTS * MAX_SIZE
        given = later.to(tl.float32)
        low = activate(tl.sum(later_parts, 0) + bias, activation).to(weights.dtype).to(tl.float32)
        more = token + 1 < start + count  # is on its way while this one is computed
        later = tl.load(own + x_stride, mask=(n < WIDTH) & more, other=0.0)
        size_then = tl.where(more, size, 0)
        later_parts = parts_at(hidden, at + PARTS * MAX_SIZE, r, size_then, PARTS, PARTS_PAD, MAX_SIZE)
        product = tl.where((r < size)[:, None], weights.to(tl.float32) * low[:, None], 0.0)
        result = tl.where(residual != 0, given, 0.0) + shift + tl.sum(product, 0)
        if MAX_SIZE > SIZES:
            for first in range(SIZES, size, SIZES):
                others_r = first + r
                there = (others_r < size)[:, None] & (n < WIDTH)[None, :]
                others = tl.load(rows + others_r[:, None] * WIDTH, mask=there, other=0.0)
                own_bias = tl.load(biases + others_r, mask=others_r < size, other=0.0).to(tl.float32)
                parts = parts_at(hidden, at, others_r, size, PARTS, PARTS_PAD, MAX_SIZE)
                low = activate(tl.sum(parts, 0) + own_bias, activation).to(weights.dtype).to(tl.float32)
                result += tl.sum(others.to(tl.float32) * low[:, None], 0)
        tl.store(own, result.to(x.dtype.element_ty), mask=(n < WIDTH) & (size > 0))


@triton.jit
def _up_kernel(
    hidden,
    tiles,
    tile_count,
    tile_stride,
    field_stride,
    down_bias,
    up,
    up_bias,
    sizes,
    activations,
    residuals,
    x,
    x_stride,
    lora_hidden,
    lora_tiles,
    lora_tile_count,
    lora_tile_stride,
    lora_field_stride,
    b,
    ranks,
    WIDTH: tl.constexpr,
    MAX_SIZE: tl.constexpr,
    SIZES: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANKS: tl.constexpr,
    LORA_PARTS: tl.constexpr,
    LORA_PARTS_PAD: tl.constexpr,
    LORA_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The up-projections; programs beyond theirs add the wide halves of other tokens' LoRAs."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    own = tile_count * BLOCKS
    if pid < own:
        start, count, slot = tile_at(tiles, pid % tile_count, tile_stride, field_stride)
        if count > 0:
            _up(
                start,
                count,
                slot,
                pid // tile_count,
                hidden,
                down_bias,
                up,
                up_bias,
                sizes,
                activations,
                residuals,
                x,
                x_stride,
                WIDTH,
                MAX_SIZE,
                SIZES,
                PARTS,
                PARTS_PAD,
                BLOCK,
                EARLY,
            )
        else:
            wait_for_previous(EARLY)
    else:
        pid -= own
        start, count, slot = tile_at(lora_tiles, pid % lora_tile_count, lora_tile_stride, lora_field_stride)
        if count > 0:
            wide(
                start,
                count,
                slot,
                pid // lora_tile_count,
                lora_hidden,
                b,
                ranks,
                x,
                x_stride,
                0,
                WIDTH,
                0,
                1,
                MAX_RANK,
                RANKS,
                LORA_PARTS,
                LORA_PARTS_PAD,
                LORA_BLOCK,
                EARLY,
            )
        else:
            wait_for_previous(EARLY)


def bottleneck_rows(
    stream: torch.Tensor,
    x: torch.Tensor,
    table: BottleneckTable,
    tiles: torch.Tensor,
    pending: PendingExpand | None = None,
) -> None:
    """See `Kernels.bottleneck`, and `bottleneck_and_expand` where there is `pending`, of one member."""
    tokens = x.shape[0]
    _, max_size, width = table.down.shape
    parts = parts_of(width, _PART)
    hidden = torch.empty(tokens, parts, max_size, dtype=torch.float32, device=x.device)
    _down_kernel[(tiles.shape[0], triton.cdiv(max_size, RANKS), parts)](
        x,
        stream,
        tiles,
        tiles.stride(0),
        tiles.stride(1),
        table.down,
        table.sizes,
        table.layouts,
        hidden,
        x.stride(0),
        stream.stride(0),
        WIDTH=width,
        MAX_SIZE=max_size,
        RANKS=RANKS,
        PARTS=parts,
        PART=_PART,
        num_warps=_DOWN_WARPS,
        **early(x),
    )
    programs, lora_tiles, lora_parts, max_rank = tiles.shape[0] * triton.cdiv(width, _UP_BLOCK), tiles, 1, 1
    if pending is not None:
        lora_tiles = pending.tiles
        _, _, lora_parts, max_rank = pending.hidden.shape
        programs += lora_tiles.shape[0] * triton.cdiv(width, _LORA_BLOCK)
    _up_kernel[(programs,)](
        hidden,
        tiles,
        tiles.shape[0],
        tiles.stride(0),
        tiles.stride(1),
        table.down_bias,
        table.up,
        table.up_bias,
        table.sizes,
        table.activations,
        table.residuals,
        x,
        x.stride(0),
        hidden if pending is None else pending.hidden,
        lora_tiles,
        lora_tiles.shape[0],
        lora_tiles.stride(0),
        lora_tiles.stride(1),
        table.up if pending is None else pending.bank.b[0],
        table.sizes if pending is None else pending.bank.ranks,
        WIDTH=width,
        MAX_SIZE=max_size,
        SIZES=_SIZES,
        PARTS=parts,
        PARTS_PAD=triton.next_power_of_2(parts),
        BLOCK=_UP_BLOCK,
        MAX_RANK=max_rank,
        RANKS=RANKS,
        LORA_PARTS=lora_parts,
        LORA_PARTS_PAD=triton.next_power_of_2(lora_parts),
        LORA_BLOCK=_LORA_BLOCK,
        num_warps=_UP_WARPS,
        **early(x),
    )
