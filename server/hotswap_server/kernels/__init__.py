"""Operations of the hot path, each with a torch reference that every faster form is tested against."""

from hotswap_server.kernels.interface import AttentionLayout, GroupedLora, Kernels, Projection, TokenSlots
from hotswap_server.kernels.select import select_kernels

__all__ = ["AttentionLayout", "GroupedLora", "Kernels", "Projection", "TokenSlots", "select_kernels"]
