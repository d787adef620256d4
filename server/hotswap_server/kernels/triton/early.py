"""Kernels that begin before the one in front has ended: Hopper's programmatic dependent launch.

What a kernel reads that the one before did not write, weights above all, is then on its way when that one
ends. Every program waits, or a kernel could end, and the next begin, before what came first.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Return when all that earlier kernels wrote can be read, which this one must before it reads any."""
    if EARLY:
        gdc_wait()


@triton.jit
def start_next(EARLY: tl.constexpr):
    """Let the next kernel begin, if it can."""
    if EARLY:
        gdc_launch_dependents()


def early(tensor: torch.Tensor) -> dict[str, Any]:
    """Arguments of the launch of a kernel that waits, on the device of `tensor`."""
    able = tensor.is_cuda and _able(tensor.get_device())
    return {"EARLY": True, "launch_pdl": True} if able else {"EARLY": False}


@cache
def _able(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
