"""LoRA of many tokens: a narrow product whose parts over the input are kept apart, then a wide one.

Both go by tiles of tokens that share a slot: an adapter's weights are read once for all of a tile's tokens,
and those without an adapter are in no tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hotswap_server.kernels.interface import GroupedLora
from hotswap_server.kernels.triton.token_tiles import MIN_ROWS, RANKS, precision, splits_of, tile_at


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
    start, count, slot = tile_at(tiles, tile, tile_stride, field_stride)
    if count > 0:
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
    start, count, slot = tile_at(tiles, tile, tile_stride, field_stride)
    if count > 0:
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


def shrink(x: torch.Tensor, bank: GroupedLora, tiles: torch.Tensor, rows: int) -> torch.Tensor:
    """x A^T of every tile's adapter: [splits, tokens, members, max_rank] float32, undefined beyond a rank."""
    members, max_rank, width = bank.a.shape[1:]
    splits = splits_of(tiles.shape[0] * members, width)
    hidden = torch.empty(splits, x.shape[0], members, max_rank, dtype=torch.float32, device=x.device)
    _shrink_kernel[(tiles.shape[0], members * triton.cdiv(max_rank, RANKS), splits)](
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
        ROWS=max(rows, MIN_ROWS),
        RANKS=RANKS,
        BLOCK=128 if x.dtype != torch.float32 else 64,
        SPLITS=splits,
        PRECISION=precision(x.dtype),
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
        ROWS=max(rows, MIN_ROWS),
        RANKS=RANKS,
        BLOCK=block,
        SPLITS=hidden.shape[0],
        PRECISION=precision(out.dtype),
        num_warps=4,
        num_stages=2,
    )
