"""LoRA and bottleneck adapters of a few tokens: bound by reading the weights, once for a tile of tokens.

A narrow product is cut over its input into parts, which are summed where they are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hotswap_server.kernels.interface import BottleneckTable, GroupedLora
from hotswap_server.kernels.triton.activations import activate
from hotswap_server.kernels.triton.early import early, start_next, wait_for_previous

MAX_TOKENS = 64
RANKS = 16  # of a narrow product that one program computes
LORA_PART, BOTTLENECK_PART = 1024, 512  # inputs that it goes through
_SIZES = 64  # rows of an up-projection at a time
NARROW_WARPS, WIDE_WARPS, DOWN_WARPS, UP_WARPS, UP_BLOCK = 2, 1, 4, 2, 64


@triton.jit
def _tile(tiles, tile, tile_stride, field_stride):
    """First token, number of tokens, and slot."""
    at = tiles + tile * tile_stride
    start = tl.load(at).to(tl.int64)
    count = tl.load(at + field_stride).to(tl.int32)
    slot = tl.load(at + 2 * field_stride).to(tl.int64)
    return start, count, slot


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
    start, count, slot = _tile(tiles, tile, tile_stride, field_stride)
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
def _parts(hidden, at, r, size, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr, WIDTH: tl.constexpr):
    """The parts of a narrow product's entries `r`, [parts, entries], zero from `size` on."""
    part = tl.arange(0, PARTS_PAD)
    inside = (part < PARTS)[:, None] & (r < size)[None, :]
    return tl.load(hidden + at + part[:, None] * WIDTH + r[None, :], mask=inside, other=0.0)


@triton.jit
def _wide_member(
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
    later_parts = _parts(hidden, first_at + start * STRIDE, r, rank, PARTS, PARTS_PAD, MAX_RANK)
    for token in range(start, start + count):
        own = columns + token * out_stride
        at = first_at + token * STRIDE
        result = later.to(tl.float32)
        # Rounded between its halves, as PEFT's is.
        low = tl.sum(later_parts, 0).to(weights.dtype).to(tl.float32)
        more = token + 1 < start + count  # is on its way while this one is computed
        later = tl.load(own + out_stride, mask=(n < WIDTH) & more, other=0.0)
        later_parts = _parts(hidden, at + STRIDE, r, tl.where(more, rank, 0), PARTS, PARTS_PAD, MAX_RANK)
        result += tl.sum(weights.to(tl.float32) * low[:, None], 0)
        for first in range(RANKS, rank, RANKS):
            others_r = first + r
            there = (others_r < rank)[:, None] & (n < WIDTH)[None, :]
            others = tl.load(rows + others_r[:, None] * WIDTH, mask=there, other=0.0)
            parts = _parts(hidden, at, others_r, rank, PARTS, PARTS_PAD, MAX_RANK)
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
    start, count, slot = _tile(tiles, tile, tile_stride, field_stride)
    if count > 0:
        for member in tl.static_range(MEMBERS):
            if (block >= FIRST_BLOCKS[member]) & (block < FIRST_BLOCKS[member + 1]):
                _wide_member(
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
    start, count, slot = _tile(tiles, tile, tile_stride, field_stride)
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
def _up_kernel(
    hidden,
    tiles,
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
    WIDTH: tl.constexpr,
    MAX_SIZE: tl.constexpr,
    SIZES: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile = tl.program_id(0)
    start, count, slot = _tile(tiles, tile, tile_stride, field_stride)
    if count > 0:
        size = tl.load(sizes + slot)
        activation = tl.load(activations + slot)
        residual = tl.load(residuals + slot)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        shift = tl.load(up_bias + slot * WIDTH + n, mask=n < WIDTH, other=0.0).to(tl.float32)
        r = tl.arange(0, SIZES)
        rows = up + slot * MAX_SIZE * WIDTH + n[None, :]
        biases = down_bias + slot * MAX_SIZE
        inside = (r < MAX_SIZE)[:, None] & (n < WIDTH)[None, :]
        weights = tl.load(rows + r[:, None] * WIDTH, mask=inside, other=0.0)
        bias = tl.load(biases + r, mask=r < size, other=0.0).to(tl.float32)
        wait_for_previous(EARLY)
        later = tl.load(x + start * x_stride + n, mask=n < WIDTH, other=0.0)
        later_parts = _parts(hidden, start * PARTS * MAX_SIZE, r, size, PARTS, PARTS_PAD, MAX_SIZE)
        for token in range(start, start + count):
            own = x + token * x_stride + n
            at = token * PARTS * MAX_SIZE
            given = later.to(tl.float32)
            low = activate(tl.sum(later_parts, 0) + bias, activation).to(weights.dtype).to(tl.float32)
            more = token + 1 < start + count  # is on its way while this one is computed
            later = tl.load(own + x_stride, mask=(n < WIDTH) & more, other=0.0)
            size_then = tl.where(more, size, 0)
            later_parts = _parts(hidden, at + PARTS * MAX_SIZE, r, size_then, PARTS, PARTS_PAD, MAX_SIZE)
            product = tl.where((r < size)[:, None], weights.to(tl.float32) * low[:, None], 0.0)
            result = tl.where(residual != 0, given, 0.0) + shift + tl.sum(product, 0)
            for first in range(SIZES, size, SIZES):
                others_r = first + r
                there = (others_r < size)[:, None] & (n < WIDTH)[None, :]
                others = tl.load(rows + others_r[:, None] * WIDTH, mask=there, other=0.0)
                own_bias = tl.load(biases + others_r, mask=others_r < size, other=0.0).to(tl.float32)
                parts = _parts(hidden, at, others_r, size, PARTS, PARTS_PAD, MAX_SIZE)
                low = activate(tl.sum(parts, 0) + own_bias, activation).to(weights.dtype).to(tl.float32)
                result += tl.sum(others.to(tl.float32) * low[:, None], 0)
            tl.store(own, result.to(x.dtype.element_ty), mask=(n < WIDTH) & (size > 0))
    else:
        wait_for_previous(EARLY)


def parts_of(width: int, part: int) -> int:
    """Parts that an input of `width` is cut into."""
    return -(-width // part)


def new_hidden(bank: GroupedLora, tokens: int) -> torch.Tensor:
    """Where `narrow` puts its sums: [tokens, members, parts, max_rank] float32, undefined beyond a rank."""
    members, max_rank, width = bank.a.shape[1:]
    parts = parts_of(width, LORA_PART)
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
        PART=LORA_PART,
        num_warps=NARROW_WARPS,
    )
    return hidden


def expand_rows(hidden: torch.Tensor, bank: GroupedLora, tiles: torch.Tensor, out: torch.Tensor) -> None:
    """Add the wide halves to `out` [tokens, sum of widths]."""
    _, members, parts, max_rank = hidden.shape
    block = 128 if tiles.shape[0] <= 4 else 256
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
        num_warps=WIDE_WARPS,
        **early(out),
    )


def bottleneck_rows(
    stream: torch.Tensor, x: torch.Tensor, table: BottleneckTable, tiles: torch.Tensor
) -> None:
    """See `Kernels.bottleneck`."""
    tokens = x.shape[0]
    _, max_size, width = table.down.shape
    parts = parts_of(width, BOTTLENECK_PART)
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
        PART=BOTTLENECK_PART,
        num_warps=DOWN_WARPS,
        **early(x),
    )
    _up_kernel[(tiles.shape[0], triton.cdiv(width, UP_BLOCK))](
        hidden,
        tiles,
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
        WIDTH=width,
        MAX_SIZE=max_size,
        SIZES=_SIZES,
        PARTS=parts,
        PARTS_PAD=triton.next_power_of_2(parts),
        BLOCK=UP_BLOCK,
        num_warps=UP_WARPS,
        **early(x),
    )
