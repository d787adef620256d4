"""Attention over the paged cache: for single tokens split over the context, for prompts in tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hotswap_server.kernels.interface import PROMPT_TILE

_PROGRAMS_WANTED = 256  # about two for each multiprocessor of a large GPU
_MAX_SPLITS = 16


@triton.jit
def _write_kernel(
    key,
    value,
    key_cache,
    value_cache,
    pages,
    offsets,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HEADS_PAD: tl.constexpr,
):
    token = tl.program_id(0)
    page = tl.load(pages + token).to(tl.int64)
    if page >= 0:
        offset = tl.load(offsets + token)
        head = tl.arange(0, HEADS_PAD)[:, None]
        d = tl.arange(0, D_PAD)[None, :]
        ok = (head < KV_HEADS) & (d < D)
        there = ((page * KV_HEADS + head) * PAGE + offset) * D + d
        k = tl.load(key + token * key_stride + head * key_head_stride + d, mask=ok)
        v = tl.load(value + token * value_stride + head * value_head_stride + d, mask=ok)
        tl.store(key_cache + there, k, mask=ok)
        tl.store(value_cache + there, v, mask=ok)


@triton.jit
def _scores(q, k, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """In units of log2, so that exp2 serves."""
    scores = tl.dot(q, k, input_precision=PRECISION) * scale
    if SOFTCAP:
        # tanh(x) is 2 * sigmoid(2 * x) - 1.
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    return scores * 1.4426950408889634


@triton.jit
def _decode_kernel(
    query,
    key_cache,
    value_cache,
    table,
    context,
    out,
    partial,
    weight,
    query_stride,
    query_head_stride,
    table_stride,
    out_stride,
    scale,
    window,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(context + sequence).to(tl.int32)
    start = 0
    if WINDOW:
        start = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - start, SPLITS), BLOCK) * BLOCK
    first = start + split * share
    last = tl.minimum(first + share, length)
    group = tl.arange(0, GROUP_PAD)
    head = kv_head * GROUP + group
    d = tl.arange(0, D_PAD)
    rows = (group < GROUP)[:, None] & (d < D)[None, :]
    q = tl.load(
        query + sequence * query_stride + head[:, None] * query_head_stride + d[None, :], mask=rows, other=0.0
    )
    best = tl.full([GROUP_PAD], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    result = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    for begin in range(first, last, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        ok = position < last
        page = tl.load(table + sequence * table_stride + position // PAGE, mask=ok, other=0).to(tl.int64)
        there = ((page * KV_HEADS + kv_head) * PAGE + position % PAGE) * D
        k = tl.load(key_cache + there[None, :] + d[:, None], mask=ok[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(value_cache + there[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        scores = _scores(q, k, scale, softcap, SOFTCAP, PRECISION)
        scores = tl.where(ok[None, :], scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        p = tl.exp2(scores - new_best[:, None])
        faded = tl.exp2(best - new_best)
        total = total * faded + tl.sum(p, 1)
        result = result * faded[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        best = new_best
    # A padded row has no context, and a split may be left none.
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    if SPLITS == 1:
        own_out = out + sequence * out_stride + head[:, None] * D + d[None, :]
        tl.store(own_out, result.to(out.dtype.element_ty), mask=rows)
    else:
        row = (sequence * KV_HEADS * GROUP + head) * SPLITS + split
        tl.store(partial + row[:, None] * D + d[None, :], result, mask=rows)
        tl.store(weight + row, best + tl.log2(tl.where(total > 0, total, 1.0)), mask=group < GROUP)


@triton.jit
def _join_kernel(
    partial,
    weight,
    out,
    out_stride,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, D_PAD)
    row = (sequence * HEADS + head) * SPLITS + split
    logs = tl.load(weight + row)
    best = tl.max(logs, 0)
    shares = tl.exp2(logs - tl.where(best > -float("inf"), best, 0.0))
    total = tl.sum(shares, 0)
    shares = shares / tl.where(total > 0, total, 1.0)
    values = tl.load(partial + row[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    result = tl.sum(values * shares[:, None], 0)
    tl.store(out + sequence * out_stride + head * D + d, result.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _prompt_kernel(
    query,
    key_cache,
    value_cache,
    table,
    tiles,
    out,
    tile_stride,
    field_stride,
    query_stride,
    query_head_stride,
    table_stride,
    out_stride,
    scale,
    window,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    at = tiles + tile * tile_stride
    sequence = tl.load(at).to(tl.int64)
    first_token = tl.load(at + field_stride).to(tl.int64)
    count = tl.load(at + 2 * field_stride).to(tl.int32)
    first_position = tl.load(at + 3 * field_stride).to(tl.int32)
    kv_head = head // GROUP
    row = tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    rows = (row < count)[:, None] & (d < D)[None, :]
    token = (first_token + row)[:, None]
    q = tl.load(query + token * query_stride + head * query_head_stride + d[None, :], mask=rows, other=0.0)
    own = first_position + row
    last = first_position + count
    first = 0
    if WINDOW:
        first = tl.maximum(first_position - window + 1, 0) // BLOCK * BLOCK
    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, D_PAD], tl.float32)
    for begin in range(first, last, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        ok = position < last
        page = tl.load(table + sequence * table_stride + position // PAGE, mask=ok, other=0).to(tl.int64)
        there = ((page * KV_HEADS + kv_head) * PAGE + position % PAGE) * D
        k = tl.load(key_cache + there[None, :] + d[:, None], mask=ok[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(value_cache + there[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        seen = ok[None, :] & (position[None, :] <= own[:, None])
        if WINDOW:
            seen = seen & (position[None, :] > own[:, None] - window)
        scores = _scores(q, k, scale, softcap, SOFTCAP, PRECISION)
        scores = tl.where(seen, scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        # A row may have seen nothing yet: its window begins further on.
        finite = tl.where(new_best > -float("inf"), new_best, 0.0)
        p = tl.exp2(scores - finite[:, None])
        faded = tl.exp2(best - finite)
        total = total * faded + tl.sum(p, 1)
        result = result * faded[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        best = new_best
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    own_out = out + token * out_stride + head * D + d[None, :]
    tl.store(own_out, result.to(out.dtype.element_ty), mask=rows)


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    pages: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Tokens whose page is negative are left out."""
    tokens, kv_heads, head_dim = key.shape
    key = key if key.stride(2) == 1 else key.contiguous()
    value = value if value.stride(2) == 1 else value.contiguous()
    _write_kernel[(tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        pages,
        offsets,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        KV_HEADS=kv_heads,
        PAGE=key_cache.shape[2],
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        HEADS_PAD=triton.next_power_of_2(kv_heads),
    )


def attend_tokens(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """One token per sequence: query and out [sequences, heads, head_dim]; a context of 0 gives zeros."""
    sequences, heads, head_dim = query.shape
    kv_heads, page = key_cache.shape[1], key_cache.shape[2]
    group = heads // kv_heads
    splits = triton.next_power_of_2(max(1, _PROGRAMS_WANTED // (sequences * kv_heads)))
    splits = min(splits, _MAX_SPLITS)
    d_pad = max(16, triton.next_power_of_2(head_dim))
    exact = query.dtype == torch.float32
    partial = weight = out
    if splits > 1:
        partial = torch.empty(sequences, heads, splits, head_dim, dtype=torch.float32, device=query.device)
        weight = torch.empty(sequences, heads, splits, dtype=torch.float32, device=query.device)
    _decode_kernel[(sequences, kv_heads, splits)](
        query,
        key_cache,
        value_cache,
        block_table,
        context,
        out,
        partial,
        weight,
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        out.stride(0),
        scale,
        window or 0,
        softcap or 1.0,
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        PAGE=page,
        D=head_dim,
        D_PAD=d_pad,
        BLOCK=32 if exact or d_pad > 128 else 64,
        SPLITS=splits,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        PRECISION="ieee" if exact else "tf32",
        num_warps=4,
        num_stages=2,
    )
    if splits > 1:
        _join_kernel[(sequences, heads)](
            partial,
            weight,
            out,
            out.stride(0),
            HEADS=heads,
            D=head_dim,
            D_PAD=d_pad,
            SPLITS=splits,
            num_warps=4,
        )


def attend_prompts(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Runs of tokens, query and out [tokens, heads, head_dim], by `tiles` of at most PROMPT_TILE of them."""
    _, heads, head_dim = query.shape
    kv_heads = key_cache.shape[1]
    d_pad = max(16, triton.next_power_of_2(head_dim))
    exact = query.dtype == torch.float32
    _prompt_kernel[(tiles.shape[0], heads)](
        query,
        key_cache,
        value_cache,
        block_table,
        tiles,
        out,
        tiles.stride(0),
        tiles.stride(1),
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        out.stride(0),
        scale,
        window or 0,
        softcap or 1.0,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        PAGE=key_cache.shape[2],
        D=head_dim,
        D_PAD=d_pad,
        ROWS=PROMPT_TILE,
        BLOCK=32 if exact or d_pad > 128 else 64,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        PRECISION="ieee" if exact else "tf32",
        num_warps=4 if d_pad <= 128 else 8,
        num_stages=2,
    )
