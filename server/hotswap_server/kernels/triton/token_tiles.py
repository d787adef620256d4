"""How products of many tokens are cut, by tiles of tokens of one slot."""

from __future__ import annotations

import torch
import triton

RANKS = 16  # rows of a narrow matrix at a time: the least that matrix units take
_PROGRAMS_WANTED = 256
_MAX_SPLITS = 16


def splits_of(programs: int, width: int) -> int:
    """Into how many parts a narrow product of `width` inputs is cut so that the GPU is filled."""
    wanted = triton.next_power_of_2(max(1, _PROGRAMS_WANTED // programs))
    return int(max(1, min(wanted, _MAX_SPLITS, width // 256)))


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"
