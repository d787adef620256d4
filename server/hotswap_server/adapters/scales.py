"""A number per feature and slot, for methods that scale or shift what a module takes or gives."""

from __future__ import annotations

import torch

from hotswap_server.engine.base import BaseModel
from hotswap_server.kernels import TokenSlots


class FeatureTable:
    """[slots + 1, features], `neutral` until `put`, which `touched` says of which slots.

    The last row stays neutral: it is what -1 means.
    """

    def __init__(self, base: BaseModel, num_slots: int, features: int, *, neutral: float) -> None:
        self._neutral = neutral
        self.touched: frozenset[int] = frozenset()
        self._table = torch.full((num_slots + 1, features), neutral, dtype=base.dtype, device=base.device)

    @staticmethod
    def size(num_slots: int, features: int) -> int:
        """Elements of such a table."""
        return (num_slots + 1) * features

    def reset(self, slot: int) -> None:
        self._table[slot] = self._neutral
        self.touched -= {slot}

    def put(self, slot: int, offset: int, values: torch.Tensor) -> None:
        """Set the features from `offset` on."""
        self._table[slot, offset : offset + values.shape[0]] = values
        self.touched |= {slot}

    def rows(self, slots: TokenSlots) -> torch.Tensor | None:
        """The numbers of each token, [tokens, features]; None if all are neutral."""
        return None if self.touched.isdisjoint(slots.used) else slots.rows_of(self._table)


class ScaleTable(FeatureTable):
    """Factors."""

    def __init__(self, base: BaseModel, num_slots: int, features: int) -> None:
        super().__init__(base, num_slots, features, neutral=1.0)


class ShiftTable(FeatureTable):
    """Summands."""

    def __init__(self, base: BaseModel, num_slots: int, features: int) -> None:
        super().__init__(base, num_slots, features, neutral=0.0)
