"""Kernels for a GPU, in Triton. Their twins are the reference's, with which they share the interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from hotswap_server.kernels.interface import (
    FEW_TOKENS,
    AttentionLayout,
    BottleneckTable,
    FourBitSource,
    FourBitWeight,
    FusedProjection,
    GroupedLora,
    PendingExpand,
    Projection,
    TokenSlots,
    prompt_tiles,
    slot_tiles,
)
from hotswap_server.kernels.reference import ReferenceKernels
from hotswap_server.kernels.triton.attention import attend_prompts, attend_tokens, write_cache
from hotswap_server.kernels.triton.bottleneck_rows import bottleneck_rows
from hotswap_server.kernels.triton.bottleneck_tiles import bottleneck
from hotswap_server.kernels.triton.four_bit import MIN_CHUNK, four_bit_linear, unpack
from hotswap_server.kernels.triton.linear import linear
from hotswap_server.kernels.triton.lora_rows import expand_rows, shrink_rows
from hotswap_server.kernels.triton.lora_tiles import expand, shrink

_FOUR_BIT_PARTS = 2
"""As many times our kernel reads a weight in 4 bits before it pays to unpack it."""


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

    def and_shrink(
        self, x: torch.Tensor, bank: GroupedLora, tiles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return linear(_dense(x), self._weight, self._bias, bank=bank, tiles=tiles)

    def weight(self) -> torch.Tensor:
        return self._weight


class FusedFourBitProjection:
    """Our kernel for a few tokens, in parts for some more; for many the weight is unpacked first."""

    def __init__(self, kernels: TritonKernels, weight: FourBitWeight, bias: torch.Tensor | None) -> None:
        self._kernels = kernels
        self._weight = weight
        self._bias = bias
        self._counters = torch.zeros(weight.packed.shape[0], dtype=torch.int32, device=weight.packed.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        part = self._kernels.linear_tokens
        if x.shape[0] > _FOUR_BIT_PARTS * part:
            return F.linear(x, unpack(self._weight), self._bias)
        x = _dense(x)
        found = [four_bit_linear(rows, self._weight, self._bias, self._counters)[0] for rows in x.split(part)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def and_shrink(
        self, x: torch.Tensor, bank: GroupedLora, tiles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return four_bit_linear(_dense(x), self._weight, self._bias, self._counters, bank=bank, tiles=tiles)

    def weight(self) -> torch.Tensor:
        return unpack(self._weight)

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes


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
        linear_tokens: int = FEW_TOKENS,
        row_tokens: int = FEW_TOKENS,
    ) -> None:
        self.linear_tokens = linear_tokens
        self.row_tokens = row_tokens

    def projection(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
        return LinearProjection(self, weight.contiguous(), bias)

    def four_bit(self, members: Sequence[FourBitSource], bias: torch.Tensor | None) -> FusedProjection | None:
        weights = [weight for member in members if (weight := member.resolved()) is not None]
        kinds = {(weight.chunk, weight.values, weight.dtype) for weight in weights}
        if len(weights) < len(members) or len(kinds) != 1 or weights[0].chunk < MIN_CHUNK:
            return None
        return FusedFourBitProjection(
            self,
            replace(
                weights[0],
                packed=torch.cat([weight.packed for weight in weights]),
                scales=torch.cat([weight.scales for weight in weights], dim=1),
            ),
            bias,
        )

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
        tiles = layout.prompts
        if tiles is None and decode < layout.block_table.shape[0]:
            host = prompt_tiles(layout.query_starts, layout.context_lengths, decode)
            tiles = torch.from_numpy(host).to(query.device)
        if tiles is not None:
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

    def project_and_shrink(
        self, projection: Projection, x: torch.Tensor, bank: GroupedLora, slots: TokenSlots
    ) -> tuple[torch.Tensor, PendingExpand] | None:
        if not isinstance(projection, LinearProjection | FusedFourBitProjection) or x.shape[0] > min(
            self.linear_tokens, self.row_tokens
        ):
            return None
        tiles, _ = _tiles(slots)
        out, hidden = projection.and_shrink(x, bank, tiles)
        return out, PendingExpand(hidden, bank, tiles)

    def expand(self, pending: PendingExpand, out: torch.Tensor) -> None:
        expand_rows(pending.hidden, pending.bank, pending.tiles, out)

    def bottleneck(
        self, stream: torch.Tensor, x: torch.Tensor, table: BottleneckTable, slots: TokenSlots
    ) -> None:
        tiles, rows = _tiles(slots)
        if x.shape[0] <= self.row_tokens and tiles.shape[0]:
            bottleneck_rows(stream, x, table, tiles)
        elif tiles.shape[0]:
            bottleneck(stream, x, table, tiles, rows)

    def bottleneck_and_expand(
        self,
        stream: torch.Tensor,
        x: torch.Tensor,
        table: BottleneckTable,
        slots: TokenSlots,
        pending: PendingExpand,
    ) -> None:
        tiles, _ = _tiles(slots)
        if x.shape[0] <= self.row_tokens and tiles.shape[0] and len(pending.bank.widths) == 1:
            bottleneck_rows(stream, x, table, tiles, pending)
        else:
            super().bottleneck_and_expand(stream, x, table, slots, pending)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x` [rows, features] with features side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _tiles(slots: TokenSlots) -> tuple[torch.Tensor, int]:
    if slots.tiles is not None:
        return slots.tiles, slots.tile_rows
    host, rows = slot_tiles(slots.index.cpu().numpy())
    return torch.from_numpy(host).to(slots.index.device), rows
