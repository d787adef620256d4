"""What adapters of a few tokens share: products whose sums are in parts."""

from __future__ import annotations

import triton
import triton.language as tl

RANKS = 16  # of a narrow product that one program computes


@triton.jit
def parts_at(hidden, at, r, size, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr, WIDTH: tl.constexpr):
    """The parts of a narrow product's entries `r`, [parts, entries], zero from `size` on."""
    part = tl.arange(0, PARTS_PAD)
    inside = (part < PARTS)[:, None] & (r < size)[None, :]
    return tl.load(hidden + at + part[:, None] * WIDTH + r[None, :], mask=inside, other=0.0)


def parts_of(width: int, part: int) -> int:
    """Parts that an input of `width` is cut into."""
    return -(-width // part)
