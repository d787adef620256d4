"""Tiles of tokens of one slot, and how products of many tokens are cut by them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

RANKS = MIN_ROWS = 16  # rows of a narrow matrix, or of tokens, at a time: the least that matrix units take
_PROGRAMS_WANTED = 256
_MAX_SPLITS = 16


@triton.jit
def tile_at(tiles, tile, tile_stride, field_stride):
    """First token, number of tokens, and slot."""
    at = tiles + tile * tile_stride
    start = tl.load(at).to(tl.int64)
    count = tl.load(at + field_stride).to(tl.int32)
    slot = tl.load(at + 2 * field_stride).to(tl.int64)
    return start, count, slot


def splits_of(programs: int, width: int) -> int:
    """Into how many parts a narrow product of `width` inputs is cut so that the GPU is filled."""
    wanted = triton.next_power_of_2(max(1, _PROGRAMS_WANTED // programs))
    return int(max(1, min(wanted, _MAX_SPLITS, width // 256)))


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"
