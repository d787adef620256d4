"""Operations of the hot path, each with a torch reference that every faster form is tested against."""

from hotswap_server.kernels.interface import (
    Activation,
    AttentionLayout,
    BottleneckLayout,
    BottleneckTable,
    FourBitSource,
    FourBitWeight,
    GroupedLora,
    Kernels,
    LowRankUpdate,
    PendingExpand,
    Projection,
    TokenSlots,
)
from hotswap_server.kernels.select import select_kernels

__all__ = [
    "Activation",
    "AttentionLayout",
    "BottleneckLayout",
    "BottleneckTable",
    "FourBitSource",
    "FourBitWeight",
    "GroupedLora",
    "Kernels",
    "LowRankUpdate",
    "PendingExpand",
    "Projection",
    "TokenSlots",
    "select_kernels",
]
