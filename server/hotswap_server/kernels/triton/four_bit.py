"""Linear layers of a few tokens over weights in 4 bits, unpacked in registers for the tensor cores.

A block's scale is multiplied into what the block's codes gave, in float32: less is rounded than where weights
are unpacked to 16 bits first. The input is cut into parts for several programs, and the last of them to end
adds up what all have found, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from hotswap_server.kernels.interface import FourBitWeight, GroupedLora
from hotswap_server.kernels.triton.early import early, start_next
from hotswap_server.kernels.triton.lora_rows import PART, narrow, new_hidden
from hotswap_server.kernels.triton.row_tiles import RANKS

MIN_CHUNK = 32  # inputs of one scale, below which a product in halves is too narrow for the tensor cores
_UNPACK_ROWS, _UNPACK_COLUMNS = 16, 512


@triton.jit
def _codes(packed, code, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """The values of the first and the second half of each byte."""
    if ASM is None:
        first = tl.load(code + (packed >> 4)).to(DTYPE)
        second = tl.load(code + (packed & 15)).to(DTYPE)
    else:
        first, second = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r", [packed], dtype=(tl.uint16, tl.uint16), is_pure=True, pack=4
        )
        first = first.to(DTYPE, bitcast=True)
        second = second.to(DTYPE, bitcast=True)
    return first, second


@triton.jit
def _halves(given, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Every first and every second column of `given` [ROWS, STEP]."""
    return tl.split(tl.reshape(given, [ROWS, STEP // 2, 2]))


@triton.jit
def _four_bit_kernel(
    x,
    packed,
    scales,
    code,
    bias,
    out,
    partial,
    counters,
    tokens,
    x_stride,
    tiles,
    tile_stride,
    field_stride,
    a,
    ranks,
    hidden,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    UNROLL: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    EARLY: tl.constexpr,
):
    start_next(EARLY)
    TILES: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    pid = tl.program_id(0)
    if pid >= TILES * SPLITS:  # last, as in `linear`
        narrow(
            pid - TILES * SPLITS,
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
    else:
        split = pid % SPLITS
        tile = pid // SPLITS
        n = tile * COLUMNS + tl.arange(0, COLUMNS)
        rows = tl.arange(0, ROWS)
        WHOLE: tl.constexpr = OUT % COLUMNS == 0
        BLOCKS: tl.constexpr = (IN // STEP + UNROLL - 1) // UNROLL
        DTYPE: tl.constexpr = x.dtype.element_ty
        w_rows = packed + n[:, None].to(tl.int64) * (IN // 2) + tl.arange(0, STEP // 2)[None, :]
        x_rows = x + rows[:, None] * x_stride + tl.arange(0, STEP)[None, :]
        s_columns = scales + n
        outputs = tl.zeros([COLUMNS, ROWS] if SWAP else [ROWS, COLUMNS], tl.float32)
        for block in tl.range(BLOCKS * split // SPLITS, BLOCKS * (split + 1) // SPLITS, num_stages=STAGES):
            for part in tl.static_range(UNROLL):
                step = block * UNROLL + part
                w_at = w_rows + step * (STEP // 2)
                s_at = s_columns + step * OUT
                if IN // STEP % UNROLL == 0:
                    if WHOLE:
                        weights = tl.load(w_at, eviction_policy="evict_first")
                        scale = tl.load(s_at)
                    else:
                        weights = tl.load(w_at, mask=(n < OUT)[:, None], other=0)
                        scale = tl.load(s_at, mask=n < OUT, other=0.0)
                    given = tl.load(x_rows + step * STEP, mask=(rows < tokens)[:, None], other=0.0)
                else:
                    there = step < IN // STEP
                    weights = tl.load(w_at, mask=(n < OUT)[:, None] & there, other=0)
                    scale = tl.load(s_at, mask=(n < OUT) & there, other=0.0)
                    given = tl.load(x_rows + step * STEP, mask=(rows < tokens)[:, None] & there, other=0.0)
                even, odd = _codes(weights, code, ASM, DTYPE)
                x_even, x_odd = _halves(given, ROWS, STEP)
                if SWAP:
                    found = tl.dot(even, tl.trans(x_even), input_precision=PRECISION)
                    found = tl.dot(odd, tl.trans(x_odd), found, input_precision=PRECISION)
                    outputs += found * scale[:, None]
                else:
                    found = tl.dot(x_even, tl.trans(even), input_precision=PRECISION)
                    found = tl.dot(x_odd, tl.trans(odd), found, input_precision=PRECISION)
                    outputs += found * scale[None, :]
        if SWAP:
            there = rows[None, :] * OUT + n[:, None]
            wanted = (rows < tokens)[None, :] & (n < OUT)[:, None]
        else:
            there = rows[:, None] * OUT + n[None, :]
            wanted = (rows < tokens)[:, None] & (n < OUT)[None, :]
        done = SPLITS == 1
        if SPLITS > 1:
            tl.store(partial + split * tokens * OUT + there, outputs, mask=wanted)
            tl.debug_barrier()
            before = tl.atomic_add(counters + tile, 1, sem="acq_rel")
            if before == SPLITS - 1:
                done = True
                tl.store(counters + tile, 0)
                outputs = tl.zeros_like(outputs)
                for other in range(SPLITS):
                    outputs += tl.load(
                        partial + other * tokens * OUT + there, mask=wanted, other=0.0, cache_modifier=".cg"
                    )
        if done:
            if BIAS:
                shift = tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32)
                if SWAP:
                    outputs += shift[:, None]
                else:
                    outputs += shift[None, :]
            tl.store(out + there, outputs.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _unpack_kernel(
    packed,
    scales,
    code,
    out,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    half = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    inside = (n < OUT)[:, None] & (half < IN // 2)[None, :]
    weights = tl.load(packed + n[:, None].to(tl.int64) * (IN // 2) + half[None, :], mask=inside, other=0)
    scale = tl.load(scales + (half * 2 // CHUNK)[None, :] * OUT + n[:, None], mask=inside, other=0.0)
    even, odd = _codes(weights, code, None, tl.float32)
    both = tl.reshape(tl.join(even * scale, odd * scale), [ROWS, COLUMNS])
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = out + n[:, None].to(tl.int64) * IN + k[None, :]
    tl.store(there, both.to(out.dtype.element_ty), mask=(n < OUT)[:, None] & (k < IN)[None, :])


@dataclass(frozen=True, slots=True)
class FourBitTiling:
    """How a layer is cut: outputs of a program, parts of the input, and how many steps are on their way."""

    columns: int
    splits: int
    warps: int
    stages: int
    swap: bool
    unroll: int


def four_bit_tiling(out_features: int, in_features: int, tokens: int, chunk: int) -> FourBitTiling:
    """Found by timing on an H100 with the shapes of Llama-3.1-8B; see docs/notebook.md."""
    large = tokens > 32 and (out_features > 16384 or in_features > 8192)
    columns, warps = (128, 4) if large else (64, 4 if tokens > 32 else 2)
    unroll, stages = (2, 3) if 16 < tokens <= 32 else (1, 4)
    # More programs hide more of their waiting, and write and read more partial sums.
    wanted, shortest = (1000, 7) if tokens <= 16 else (512, 14) if tokens <= 32 else (256, 14)
    splits = round(wanted / triton.cdiv(out_features, columns))
    return FourBitTiling(
        columns, max(1, min(splits, in_features // chunk // shortest)), warps, stages, False, unroll
    )


def four_bit_linear(
    x: torch.Tensor,
    weight: FourBitWeight,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    *,
    bank: GroupedLora | None = None,
    tiles: torch.Tensor | None = None,
    cut: FourBitTiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `linear`, of a weight whose chunks have MIN_CHUNK inputs or more.

    `counters` [out_features] int32 are zero, before and after.
    """
    tokens, in_features = x.shape
    out_features = weight.packed.shape[0]
    exact = x.dtype == torch.float32
    cut = cut or four_bit_tiling(out_features, in_features, tokens, weight.chunk)
    out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    partial = out
    if cut.splits > 1:
        partial = torch.empty(cut.splits, tokens, out_features, dtype=torch.float32, device=x.device)
    hidden = out if bank is None else new_hidden(bank, tokens)
    members, parts, max_rank = (1, 1, 1) if bank is None else hidden.shape[1:]
    programs = 0 if tiles is None else tiles.shape[0] * members * triton.cdiv(max_rank, RANKS) * parts
    asm = lookup(weight.values, x.dtype) if x.is_cuda and not exact else None
    _four_bit_kernel[(programs + triton.cdiv(out_features, cut.columns) * cut.splits,)](
        x,
        weight.packed,
        weight.scales,
        weight.code,
        out if bias is None else bias,
        out,
        partial,
        counters,
        tokens,
        x.stride(0),
        out if tiles is None else tiles,
        0 if tiles is None else tiles.stride(0),
        0 if tiles is None else tiles.stride(1),
        out if bank is None else bank.a,
        out if bank is None else bank.ranks,
        hidden,
        IN=in_features,
        OUT=out_features,
        BIAS=bias is not None,
        ROWS=max(16, triton.next_power_of_2(tokens)),
        COLUMNS=cut.columns,
        STEP=weight.chunk,
        SPLITS=cut.splits,
        UNROLL=cut.unroll,
        SWAP=cut.swap,
        STAGES=cut.stages,
        PRECISION="ieee" if exact else "tf32",
        ASM=asm,
        MEMBERS=members,
        MAX_RANK=max_rank,
        RANKS=RANKS,
        PARTS=parts,
        PART=PART,
        EARLY=early(x)["EARLY"],
        num_warps=cut.warps,
    )
    return out, hidden


def unpack(weight: FourBitWeight) -> torch.Tensor:
    """The weight [out_features, in_features] itself."""
    out_features, in_features = weight.packed.shape[0], weight.packed.shape[1] * 2
    out = torch.empty(out_features, in_features, dtype=weight.dtype, device=weight.packed.device)
    grid = (triton.cdiv(out_features, _UNPACK_ROWS), triton.cdiv(in_features, _UNPACK_COLUMNS))
    _unpack_kernel[grid](
        weight.packed,
        weight.scales,
        weight.code,
        out,
        IN=in_features,
        OUT=out_features,
        CHUNK=weight.chunk,
        ROWS=_UNPACK_ROWS,
        COLUMNS=_UNPACK_COLUMNS,
    )
    return out


@cache
def lookup(values: tuple[float, ...], dtype: torch.dtype) -> str:
    """PTX that finds the 16-bit values of the eight codes in a register, without memory.

    Codes choose among the bytes of two registers (`prmt`), those below 8 and the others; their fourth bit,
    made a mask, chooses between the two. Upper and lower bytes are looked up apart and put together at last.
    """
    words = [value & 0xFFFF for value in torch.tensor(values).to(dtype).view(torch.int16).tolist()]

    def table(shift: int, first: int) -> str:
        chosen = [words[first + i] >> shift & 0xFF for i in range(4)]
        return f"0x{sum(byte << 8 * i for i, byte in enumerate(chosen)):08x}"

    lines = [
        ".reg .b32 s, u, m, p, q, l, h;",
        "and.b32 s, $4, 0x77777777;",
        "shl.b32 u, $4, 4;",
    ]
    for plane, shift in (("l", 0), ("h", 8)):
        for index in range(4):
            lines += [f".reg .b32 {plane}{index};", f"mov.b32 {plane}{index}, {table(shift, 4 * index)};"]
    # A mask's bytes repeat the signs of bytes 4, 0, 5, 1 of what is given, and of 6, 2, 7, 3.
    for first, second, signs in (("$0", "$2", "0x9D8C"), ("$1", "$3", "0xBFAE")):
        lines.append(f"prmt.b32 m, $4, u, {signs};")
        for plane in ("l", "h"):
            lines += [
                f"prmt.b32 p, {plane}0, {plane}1, s;",
                f"prmt.b32 q, {plane}2, {plane}3, s;",
                f"lop3.b32 {plane}, m, q, p, 0xCA;",
            ]
        lines += [f"prmt.b32 {first}, l, h, 0x7351;", f"prmt.b32 {second}, l, h, 0x6240;"]
        if first == "$0":
            lines.append("shr.u32 s, s, 16;")
    return "{" + "\n".join(lines) + "}"
