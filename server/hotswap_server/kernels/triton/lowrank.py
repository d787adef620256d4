"""LoRA and bottleneck adapters: a narrow product whose parts over the input are kept apart, then a wide one.

Both go by tiles of tokens that share a slot: an adapter's weights are read once for all of a tile's tokens,
and those without an adapter are in no tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hotswap_server.kernels.interface import BottleneckTable, GroupedLora
from hotswap_server.kernels.triton.activations import activate

_PROGRAMS_WANTED = 256
_MAX_SPLITS = 16
_RANKS = 16  # rows of a narrow matrix at a time: the least that matrix units take


@triton.jit
def _shrink_kernel(
    x,
    a,
    ranks,
    tiles,
    hidden,
    x_stride,
    tile_stride,
    field_stride,
    split_stride,
    WIDTH: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    RANK_BLOCKS: tl.constexpr = (MAX_RANK + RANKS - 1) // RANKS
    member = tl.program_id(1) // RANK_BLOCKS
    first_rank = tl.program_id(1) % RANK_BLOCKS * RANKS
    split = tl.program_id(2)
    start = tl.load(tiles + tile * tile_stride).to(tl.int64)
    count = tl.load(tiles + tile * tile_stride + field_stride)
    if count > 0:
        slot = tl.load(tiles + tile * tile_stride + 2 * field_stride).to(tl.int64)
        rank = tl.load(ranks + slot * MEMBERS + member)
        if first_rank < rank:
            SHARE: tl.constexpr = ((WIDTH + SPLITS - 1) // SPLITS + BLOCK - 1) // BLOCK * BLOCK
            row = tl.arange(0, ROWS)
            r = first_rank + tl.arange(0, RANKS)
            x_rows = x + (start + row)[:, None] * x_stride
            a_rows = a + ((slot * MEMBERS + member) * MAX_RANK + r)[:, None] * WIDTH
            result = tl.zeros([ROWS, RANKS], tl.float32)
            for begin in range(split * SHARE, split * SHARE + SHARE, BLOCK):
                k = begin + tl.arange(0, BLOCK)
                inside = (k < WIDTH)[None, :]
                given = tl.load(x_rows + k[None, :], mask=(row < count)[:, None] & inside, other=0.0)
                weights = tl.load(a_rows + k[None, :], mask=(r < rank)[:, None] & inside, other=0.0)
                result += tl.dot(given, tl.trans(weights), input_precision=PRECISION)
            there = split * split_stride + (start + row)[:, None] * (MEMBERS * MAX_RANK)
            there += member * MAX_RANK + r[None, :]
            tl.store(hidden + there, result, mask=(row < count)[:, None] & (r < rank)[None, :])


@triton.jit
def _expand_member(
    hidden,
    b,
    ranks,
    out,
    start,
    count,
    slot,
    block,
    out_stride,
    split_stride,
    MEMBER: tl.constexpr,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rank = tl.load(ranks + slot * MEMBERS + MEMBER)
    if rank > 0:
        row = tl.arange(0, ROWS)
        n = block * BLOCK + tl.arange(0, BLOCK)
        wanted = (row < count)[:, None] & (n < WIDTH)[None, :]
        there = out + (start + row)[:, None] * out_stride + OFFSET + n[None, :]
        result = tl.load(there, mask=wanted, other=0.0).to(tl.float32)
        for first_rank in range(0, rank, RANKS):
            r = first_rank + tl.arange(0, RANKS)
            weights = tl.load(
                b + (slot * MAX_RANK + r)[:, None] * WIDTH + n[None, :],
                mask=(r < rank)[:, None] & (n < WIDTH)[None, :],
                other=0.0,
            )
            narrow = (start + row)[:, None] * (MEMBERS * MAX_RANK) + MEMBER * MAX_RANK + r[None, :]
            inside = (row < count)[:, None] & (r < rank)[None, :]
            low = tl.zeros([ROWS, RANKS], tl.float32)
            for split in tl.static_range(SPLITS):
                low += tl.load(hidden + split * split_stride + narrow, mask=inside, other=0.0)
            result += tl.dot(low.to(weights.dtype), weights, input_precision=PRECISION)
        tl.store(there, result.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _expand_kernel(
    hidden,
    b,
    ranks,
    tiles,
    out,
    tile_stride,
    field_stride,
    out_stride,
    split_stride,
    WIDTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
    FIRST_BLOCKS: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    block = tl.program_id(1)
    start = tl.load(tiles + tile * tile_stride).to(tl.int64)
    count = tl.load(tiles + tile * tile_stride + field_stride)
    if count > 0:
        slot = tl.load(tiles + tile * tile_stride + 2 * field_stride).to(tl.int64)
        for member in tl.static_range(MEMBERS):
            if (block >= FIRST_BLOCKS[member]) & (block < FIRST_BLOCKS[member + 1]):
                _expand_member(
                    hidden,
                    b[member],
                    ranks,
                    out,
                    start,
                    count,
                    slot,
                    block - FIRST_BLOCKS[member],
                    out_stride,
                    split_stride,
                    member,
                    WIDTHS[member],
                    OFFSETS[member],
                    MEMBERS,
                    MAX_RANK,
                    ROWS,
                    RANKS,
                    BLOCK,
                    SPLITS,
                    PRECISION,
                )


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
    start = tl.load(tiles + tile * tile_stride).to(tl.int64)
    count = tl.load(tiles + tile * tile_stride + field_stride)
    if count > 0:
        slot = tl.load(tiles + tile * tile_stride + 2 * field_stride).to(tl.int64)
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
    start = tl.load(tiles + tile * tile_stride).to(tl.int64)
    count = tl.load(tiles + tile * tile_stride + field_stride)
    if count > 0:
        slot = tl.load(tiles + tile * tile_stride + 2 * field_stride).to(tl.int64)
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


def _splits(programs: int, width: int) -> int:
    """Into how many parts a narrow product of `width` inputs is cut so that the GPU is filled."""
    wanted = triton.next_power_of_2(max(1, _PROGRAMS_WANTED // programs))
    return int(max(1, min(wanted, _MAX_SPLITS, width // 256)))


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def shrink(x: torch.Tensor, bank: GroupedLora, tiles: torch.Tensor, rows: int) -> torch.Tensor:
    """x A^T of every tile's adapter: [splits, tokens, members, max_rank] float32, undefined beyond a rank."""
    members, max_rank, width = bank.a.shape[1:]
    splits = _splits(tiles.shape[0] * members, width)
    hidden = torch.empty(splits, x.shape[0], members, max_rank, dtype=torch.float32, device=x.device)
    _shrink_kernel[(tiles.shape[0], members * triton.cdiv(max_rank, _RANKS), splits)](
        x,
        bank.a,
        bank.ranks,
        tiles,
        hidden,
        x.stride(0),
        tiles.stride(0),
        tiles.stride(1),
        hidden.stride(0),
        WIDTH=width,
        MEMBERS=members,
        MAX_RANK=max_rank,
        ROWS=rows,
        RANKS=_RANKS,
        BLOCK=128 if x.dtype != torch.float32 else 64,
        SPLITS=splits,
        PRECISION=_precision(x.dtype),
        num_warps=4,
        num_stages=3,
    )
    return hidden


def expand(
    hidden: torch.Tensor, bank: GroupedLora, tiles: torch.Tensor, rows: int, out: torch.Tensor
) -> None:
    """Add hidden B of every tile's adapter to `out` [tokens, sum of widths]."""
    block = 128
    firsts = [0]
    for width in bank.widths:
        firsts.append(firsts[-1] + triton.cdiv(width, block))
    _expand_kernel[(tiles.shape[0], firsts[-1])](
        hidden,
        bank.b,
        bank.ranks,
        tiles,
        out,
        tiles.stride(0),
        tiles.stride(1),
        out.stride(0),
        hidden.stride(0),
        WIDTHS=bank.widths,
        OFFSETS=bank.offsets,
        FIRST_BLOCKS=tuple(firsts),
        MEMBERS=len(bank.b),
        MAX_RANK=hidden.shape[3],
        ROWS=rows,
        RANKS=_RANKS,
        BLOCK=block,
        SPLITS=hidden.shape[0],
        PRECISION=_precision(out.dtype),
        num_warps=4,
        num_stages=2,
    )


def bottleneck(
    stream: torch.Tensor, x: torch.Tensor, table: BottleneckTable, tiles: torch.Tensor, rows: int
) -> None:
    """See `Kernels.bottleneck`."""
    _, max_size, width = table.down.shape
    splits = _splits(tiles.shape[0] * triton.cdiv(max_size, _RANKS), width)
    hidden = torch.empty(splits, x.shape[0], max_size, dtype=torch.float32, device=x.device)
    common = {
        "WIDTH": width,
        "MAX_SIZE": max_size,
        "ROWS": rows,
        "RANKS": _RANKS,
        "SPLITS": splits,
        "PRECISION": _precision(x.dtype),
        "num_warps": 4,
    }
    _down_kernel[(tiles.shape[0], triton.cdiv(max_size, _RANKS), splits)](
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
