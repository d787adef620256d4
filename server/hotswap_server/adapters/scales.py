"""Factors per feature and slot, for methods that scale what a projection takes or gives."""

from __future__ import annotations

import torch

from hotswap_server.engine.base import BaseModel
from hotswap_server.kernels import TokenSlots


class ScaleTable:
    """[slots + 1, features]. The last row is ones: the row that -1, for a token without a slot, means."""

    def __init__(self, base: BaseModel, num_slots: int, features: int) -> None:
        self._table = torch.ones(num_slots + 1, features, dtype=base.dtype, device=base.device)

    def reset(self, slot: int) -> None:
        self._table[slot] = 1.0

    def put(self, slot: int, offset: int, scale: torch.Tensor) -> None:
        """Set the factors of the features from `offset` on."""
        self._table[slot, offset : offset + scale.shape[0]] = scale

    def rows(self, slots: TokenSlots) -> torch.Tensor:
        """The factors of each token, [tokens, features]."""
        return self._table[slots.index.long()]
