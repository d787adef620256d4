"""Kernels for a GPU, in Triton. Their twins are the reference's, with which they share the interface."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hotswap_server.kernels.interface import (
    AttentionLayout,
    BottleneckTable,
    GroupedLora,
    Projection,
    TokenSlots,
    prompt_tiles,
    slot_tiles,
)
from hotswap_server.kernels.reference import ReferenceKernels
from hotswap_server.kernels.triton.attention import attend_prompts, attend_tokens, write_cache
from hotswap_server.kernels.triton.linear import linear
from hotswap_server.kernels.triton.lowrank import bottleneck, expand, shrink
from hotswap_server.kernels.triton.rows import MAX_TOKENS, bottleneck_rows, expand_rows, shrink_rows


class LinearProjection:
    """Our kernel for a few tokens, the vendor's library for more."""

    def __init__(self, kernels: TritonKernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._kernels = kernels
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > self._kernels.linear_tokens:
            return F.linear(x, self._weight, self._bias)
        return linear(_dense(x), self._weight, self._bias)[0]

    def with_lora(self, x: torch.Tensor, bank: GroupedLora, slots: TokenSlots) -> torch.Tensor:
        tiles, _ = _tiles(slots)
        out, hidden = linear(_dense(x), self._weight, self._bias, bank=bank, tiles=tiles)
        expand_rows(hidden, bank, tiles, out)
        return out

    def weight(self) -> torch.Tensor:
        return self._weight


class TritonKernels(ReferenceKernels):
    """Kernels for a GPU.

    Products of more tokens than `linear_tokens` are the vendor's library's. Adapters go in tiles of few rows
    up to `row_tokens`, in larger ones beyond; up to `linear_tokens`, half of a LoRA runs beside its product.
    """

    name = "triton"
    can_be_recorded = True

    def __init__(
        self,
        *,
        linear_tokens: int = MAX_TOKENS,
        row_tokens: int = MAX_TOKENS,
    ) -> None:
        self.linear_tokens = linear_tokens
        self.row_tokens = row_tokens

    def projection(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
        return LinearProjection(self, weight.contiguous(), bias)

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        layout: AttentionLayout,
    ) -> None:
        write_cache(key, value, key_cache, value_cache, layout.token_pages, layout.token_offsets)

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        layout: AttentionLayout,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        query = query if query.stride(2) == 1 else query.contiguous()
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        decode = layout.num_decode
        if decode:
            attend_tokens(
                query[:decode],
                key_cache,
                value_cache,
                layout.block_table,
                layout.context,
                out,
                scale=scale,
                window=window,
                softcap=softcap,
            )
        if decode < layout.block_table.shape[0]:
            tiles = layout.prompts
            if tiles is None:
                host = prompt_tiles(layout.query_starts, layout.context_lengths, decode)
                tiles = torch.from_numpy(host).to(query.device)
            attend_prompts(
                query,
                key_cache,
                value_cache,
                layout.block_table,
                tiles,
                out,
                scale=scale,
                window=window,
                softcap=softcap,
            )
        return out

    def lora(self, x: torch.Tensor, bank: GroupedLora, slots: TokenSlots, out: torch.Tensor) -> None:
        x = _dense(x)
        tiles, rows = _tiles(slots)
        if x.shape[0] <= self.row_tokens and tiles.shape[0]:
            expand_rows(shrink_rows(x, bank, tiles), bank, tiles, out)
        elif tiles.shape[0]:
            expand(shrink(x, bank, tiles, rows), bank, tiles, rows, out)

    def project_with_lora(
        self, projection: Projection, x: torch.Tensor, bank: GroupedLora, slots: TokenSlots
    ) -> torch.Tensor | None:
        if not isinstance(projection, LinearProjection) or x.shape[0] > min(
            self.linear_tokens, self.row_tokens
        ):
            return None
        return projection.with_lora(x, bank, slots)

    def bottleneck(
        self, stream: torch.Tensor, x: torch.Tensor, table: BottleneckTable, slots: TokenSlots
    ) -> None:
        tiles, rows = _tiles(slots)
        if x.shape[0] <= self.row_tokens and tiles.shape[0]:
            bottleneck_rows(stream, x, table, tiles)
        elif tiles.shape[0]:
            bottleneck(stream, x, table, tiles, rows)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x` [rows, features] with features side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _tiles(slots: TokenSlots) -> tuple[torch.Tensor, int]:
    if slots.tiles is not None:
        return slots.tiles, slots.tile_rows
    host, rows = slot_tiles(slots.index.cpu().numpy())
    return torch.from_numpy(host).to(slots.index.device), rows
