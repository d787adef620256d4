"""LoRA of a few tokens: bound by reading the weights, once for a tile of tokens.

The narrow product is cut over its input into parts, which are summed where they are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hotswap_server.kernels.interface import GroupedLora
from hotswap_server.kernels.triton.early import early, start_next, wait_for_previous
from hotswap_server.kernels.triton.row_tiles import RANKS, parts_at, parts_of
from hotswap_server.kernels.triton.token_tiles import tile_at

PART = 1024  # inputs that a program of the narrow product goes through
_NARROW_WARPS, _WIDE_WARPS = 2, 1


@triton.jit
def narrow(
    pid,
    x,
    x_stride,
    tiles,
    tile_stride,
    field_stride,
    a,
    ranks,
    hidden,
    IN: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """x A^T of one tile of tokens, member, block of ranks and part of the input."""
    RANK_BLOCKS: tl.constexpr = (MAX_RANK + RANKS - 1) // RANKS
    part = pid % PARTS
    first_rank = pid // PARTS % RANK_BLOCKS * RANKS
    member = pid // (PARTS * RANK_BLOCKS) % MEMBERS
    tile = pid // (PARTS * RANK_BLOCKS * MEMBERS)
    start, count, slot = tile_at(tiles, tile, tile_stride, field_stride)
    if count > 0:
        rank = tl.load(ranks + slot * MEMBERS + member)
        if first_rank < rank:
            r = first_rank + tl.arange(0, RANKS)
            k = part * PART + tl.arange(0, PART)
            rows = a + ((slot * MEMBERS + member) * MAX_RANK + r)[:, None] * IN
            inside = (r < rank)[:, None] & (k < IN)[None, :]
            weights = tl.load(rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
            later = tl.load(x + start * x_stride + k, mask=k < IN, other=0.0)
            for token in range(start, start + count):
                given = later.to(tl.float32)
                more = token + 1 < start + count  # is on its way while this one is computed
                later = tl.load(x + (token + 1) * x_stride + k, mask=(k < IN) & more, other=0.0)
                there = ((token * MEMBERS + member) * PARTS + part) * MAX_RANK + r
                tl.store(hidden + there, tl.sum(weights * given[None, :], 1), mask=r < rank)


@triton.jit
def _narrow_kernel(
    x,
    x_stride,
    tiles,
    tile_stride,
    field_stride,
    a,
    ranks,
    hidden,
    IN: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    narrow(
        tl.program_id(0),
        x,
        x_stride,
        tiles,
        tile_stride,
        field_stride,
        a,
        ranks,
        hidden,
        IN,
        MEMBERS,
        MAX_RANK,
        RANKS,
        PARTS,
        PART,
    )


@triton.jit
def wide(
    start,
    count,
    slot,
    block,
    hidden,
    b,
    ranks,
    out,
    out_stride,
    MEMBER: tl.constexpr,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Add B (x A^T) of one tile of tokens, member and block of outputs; waits for what came before."""
    rank = tl.load(ranks + slot * MEMBERS + MEMBER)
    n = block * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, RANKS)
    rows = b + slot * MAX_RANK * WIDTH + n[None, :]
    inside = (r < rank)[:, None] & (n < WIDTH)[None, :]
    weights = tl.load(rows + r[:, None] * WIDTH, mask=inside, other=0.0)
    wait_for_previous(EARLY)
    STRIDE: tl.constexpr = MEMBERS * PARTS * MAX_RANK
    first_at = MEMBER * PARTS * MAX_RANK
    columns = out + OFFSET + n
    later = tl.load(columns + start * out_stride, mask=n < WIDTH, other=0.0)
    later_parts = parts_at(hidden, first_at + start * STRIDE, r, rank, PARTS, PARTS_PAD, MAX_RANK)
    for token in range(start, start + count):
        own = columns + token * out_stride
        at = first_at + token * STRIDE
        result = later.to(tl.float32)
        # Rounded between its halves, as PEFT's is.
        low = tl.sum(later_parts, 0).to(weights.dtype).to(tl.float32)
        more = token + 1 < start + count  # is on its way while this one is computed
        later = tl.load(own + out_stride, mask=(n < WIDTH) & more, other=0.0)
        later_parts = parts_at(hidden, at + STRIDE, r, tl.where(more, rank, 0), PARTS, PARTS_PAD, MAX_RANK)
        result += tl.sum(weights.to(tl.float32) * low[:, None], 0)
        if MAX_RANK > RANKS:
            for first in range(RANKS, rank, RANKS):
                others_r = first + r
                there = (others_r < rank)[:, None] & (n < WIDTH)[None, :]
                others = tl.load(rows + others_r[:, None] * WIDTH, mask=there, other=0.0)
                parts = parts_at(hidden, at, others_r, rank, PARTS, PARTS_PAD, MAX_RANK)
                low = tl.sum(parts, 0).to(weights.dtype).to(tl.float32)
                result += tl.sum(others.to(tl.float32) * low[:, None], 0)
        tl.store(own, result.to(out.dtype.element_ty), mask=(n < WIDTH) & (rank > 0))


@triton.jit
def _wide_kernel(
    hidden,
    tiles,
    tile_stride,
    field_stride,
    b,
    ranks,
    out,
    out_stride,
    WIDTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
    FIRST_BLOCKS: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    start_next(EARLY)
    tile = tl.program_id(0)
    block = tl.program_id(1)
    start, count, slot = tile_at(tiles, tile, tile_stride, field_stride)
    if count > 0:
        for member in tl.static_range(MEMBERS):
            if (block >= FIRST_BLOCKS[member]) & (block < FIRST_BLOCKS[member + 1]):
                wide(
                    start,
                    count,
                    slot,
                    block - FIRST_BLOCKS[member],
                    hidden,
                    b[member],
                    ranks,
                    out,
                    out_stride,
                    member,
                    WIDTHS[member],
                    OFFSETS[member],
                    MEMBERS,
                    MAX_RANK,
                    RANKS,
                    PARTS,
                    PARTS_PAD,
                    BLOCK,
                    EARLY,
                )
    else:
        wait_for_previous(EARLY)


def new_hidden(bank: GroupedLora, tokens: int) -> torch.Tensor:
    """Where `narrow` puts its sums: [tokens, members, parts, max_rank] float32, undefined beyond a rank."""
    members, max_rank, width = bank.a.shape[1:]
    parts = parts_of(width, PART)
    return torch.empty(tokens, members, parts, max_rank, dtype=torch.float32, device=bank.a.device)


def shrink_rows(x: torch.Tensor, bank: GroupedLora, tiles: torch.Tensor) -> torch.Tensor:
    """The narrow halves of all rows' LoRAs; see `new_hidden`."""
    hidden = new_hidden(bank, x.shape[0])
    _, members, parts, max_rank = hidden.shape
    _narrow_kernel[(tiles.shape[0] * members * triton.cdiv(max_rank, RANKS) * parts,)](
        x,
        x.stride(0),
        tiles,
        tiles.stride(0),
        tiles.stride(1),
        bank.a,
        bank.ranks,
        hidden,
        IN=bank.a.shape[3],
        MEMBERS=members,
        MAX_RANK=max_rank,
        RANKS=RANKS,
        PARTS=parts,
        PART=PART,
        num_warps=_NARROW_WARPS,
    )
    return hidden


def expand_rows(hidden: torch.Tensor, bank: GroupedLora, tiles: torch.Tensor, out: torch.Tensor) -> None:
    """Add the wide halves to `out` [tokens, sum of widths]."""
    _, members, parts, max_rank = hidden.shape
    block = 128 if tiles.shape[0] <= 8 else 256
    firsts = [0]
    for width in bank.widths:
        firsts.append(firsts[-1] + triton.cdiv(width, block))
    _wide_kernel[(tiles.shape[0], firsts[-1])](
        hidden,
        tiles,
        tiles.stride(0),
        tiles.stride(1),
        bank.b,
        bank.ranks,
        out,
        out.stride(0),
        WIDTHS=bank.widths,
        OFFSETS=bank.offsets,
        FIRST_BLOCKS=tuple(firsts),
        MEMBERS=members,
        MAX_RANK=max_rank,
        RANKS=RANKS,
        PARTS=parts,
        PARTS_PAD=triton.next_power_of_2(parts),
        BLOCK=block,
        num_warps=_WIDE_WARPS,
        **early(out),
    )
