"""The functions of bottleneck adapters, numbered as `Activation` is."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, activation):
    result = tl.maximum(z, 0.0)  # 0, ReLU
    if activation == 1:
        result = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if activation == 2:
        cubic = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        result = z * tl.sigmoid(2.0 * cubic)  # (1 + tanh(c)) / 2 is sigmoid(2c)
    if activation == 3:
        result = z * tl.sigmoid(z)
    if activation == 4:
        result = 2.0 * tl.sigmoid(2.0 * z) - 1.0
    if activation == 5:
        result = tl.sigmoid(z)
    if activation == 6:
        result = tl.where(z > 0, z, 0.01 * z)
    return result
