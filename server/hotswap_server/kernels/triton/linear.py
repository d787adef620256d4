"""Linear layers of a few tokens, bound by reading the weights, with the narrow halves of their LoRAs beside.

The first programs of a launch compute blocks of the layer's outputs, all others x A^T of the rows' adapters:
small ones, which go where the large ones leave room and would fill no GPU by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hotswap_server.kernels.interface import GroupedLora
from hotswap_server.kernels.triton.early import early, start_next
from hotswap_server.kernels.triton.lora_rows import PART, narrow, new_hidden
from hotswap_server.kernels.triton.row_tiles import RANKS


@triton.jit
def _linear_kernel(
    x,
    weight,
    bias,
    out,
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
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    EARLY: tl.constexpr,
):
    start_next(EARLY)
    BLOCKS: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    pid = tl.program_id(0)
    if pid >= BLOCKS:
        narrow(
            pid - BLOCKS,
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
        n = pid * COLUMNS + tl.arange(0, COLUMNS)
        rows = tl.arange(0, ROWS)
        k = tl.arange(0, STEP)
        w_rows = weight + n[:, None].to(tl.int64) * IN + k[None, :]
        x_rows = x + rows[:, None] * x_stride + k[None, :]
        outputs = tl.zeros([COLUMNS, ROWS] if SWAP else [ROWS, COLUMNS], tl.float32)
        for begin in range(0, IN, STEP):
            inside = (k + begin < IN)[None, :]
            weights = tl.load(
                w_rows + begin, mask=(n < OUT)[:, None] & inside, other=0.0, eviction_policy="evict_first"
            )
            given = tl.load(x_rows + begin, mask=(rows < tokens)[:, None] & inside, other=0.0)
            if SWAP:
                outputs += tl.dot(weights, tl.trans(given), input_precision=PRECISION)
            else:
                outputs += tl.dot(given, tl.trans(weights), input_precision=PRECISION)
        if BIAS:
            shift = tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32)
            if SWAP:
                outputs += shift[:, None]
            else:
                outputs += shift[None, :]
        if SWAP:
            there = out + rows[None, :] * OUT + n[:, None]
            wanted = (rows < tokens)[None, :] & (n < OUT)[:, None]
        else:
            there = out + rows[:, None] * OUT + n[None, :]
            wanted = (rows < tokens)[:, None] & (n < OUT)[None, :]
        tl.store(there, outputs.to(out.dtype.element_ty), mask=wanted)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a layer is cut: outputs of a program, inputs at a time, and how many of them are on their way."""

    columns: int
    step: int
    warps: int
    stages: int
    swap: bool


def tiling(out_features: int, *, beside: bool = False) -> Tiling:
    """Found by timing on Hopper with the shapes of Llama-3.1-8B; see docs/notebook.md.

    `beside` says that narrow halves go beside, for which two programs must fit on a multiprocessor.
    """
    if out_features <= 5120:  # or there would be fewer programs than multiprocessors by far
        return Tiling(32, 256, 4, 4, False)
    if out_features <= 16384:
        return Tiling(64, 128, 4, 4 if beside else 5, True)
    return Tiling(128, 128, 8, 4, True)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    bank: GroupedLora | None = None,
    tiles: torch.Tensor | None = None,
    cut: Tiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [tokens, in_features] -> [tokens, out_features], of up to FEW_TOKENS tokens.

    With a `bank` and `tiles`, those of `TokenSlots`, what is returned beside is what `shrink_rows` gives.
    """
    tokens, in_features = x.shape
    out_features = weight.shape[0]
    exact = x.dtype == torch.float32
    cut = cut or (Tiling(32, 64, 4, 3, False) if exact else tiling(out_features, beside=bank is not None))
    out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    hidden = out if bank is None else new_hidden(bank, tokens)
    members, parts, max_rank = (1, 1, 1) if bank is None else hidden.shape[1:]
    programs = 0 if tiles is None else tiles.shape[0] * members * triton.cdiv(max_rank, RANKS) * parts
    _linear_kernel[(programs + triton.cdiv(out_features, cut.columns),)](
        x,
        weight,
        out if bias is None else bias,
        out,
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
        STEP=cut.step,
        SWAP=cut.swap,
        PRECISION="ieee" if exact else "tf32",
        MEMBERS=members,
        MAX_RANK=max_rank,
        RANKS=RANKS,
        PARTS=parts,
        PART=PART,
        EARLY=early(x)["EARLY"],
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    return out, hidden
