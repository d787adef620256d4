"""The torch form of every kernel: any device and dtype, the twin that faster forms are tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from hotswap_server.kernels.interface import (
    Activation,
    AttentionLayout,
    BottleneckLayout,
    BottleneckTable,
    FourBitSource,
    FourBitWeight,
    FusedProjection,
    GroupedLora,
    LowRankUpdate,
    PendingExpand,
    Projection,
    Segment,
    TokenSlots,
    slot_tiles,
)

_ROWS = 4096  # of a weight, in float32 at a time


class PlainProjection:
    """`F.linear` over the weight as it is."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def weight(self) -> torch.Tensor:
        return self._weight


def unpack_four_bit(weight: FourBitWeight) -> torch.Tensor:
    """The weight [out_features, in_features] itself (Dettmers et al., "QLoRA", 2023)."""
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), dim=-1).flatten(1)
    scales = weight.scales.t().repeat_interleave(weight.chunk, dim=1)
    return (weight.code[codes.long()] * scales).to(weight.dtype)


def merged_weight(weight: torch.Tensor, update: LowRankUpdate) -> torch.Tensor:
    """The updated weight in its own type and on its device, computed in float32, some rows at a time."""
    if not update.rank:
        return weight
    a, b = (part.to(weight.device, torch.float32) for part in (update.a, update.b))
    scale = None if update.scale is None else update.scale.to(weight.device, torch.float32)[:, None]
    merged = torch.empty_like(weight)
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        part = torch.addmm(weight[rows].float(), b[:, rows].t(), a)
        merged[rows] = part if scale is None else part.mul_(scale[rows])
    return merged


class ReferenceKernels:
    """Loops over sequences and adapters in Python: clear, and slow."""

    name = "reference"
    can_be_recorded = False

    def projection(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
        return PlainProjection(weight, bias)

    def four_bit(self, members: Sequence[FourBitSource], bias: torch.Tensor | None) -> FusedProjection | None:
        return None

    def merged(
        self,
        projection: Projection,
        updates: Sequence[tuple[int, LowRankUpdate]],
        bias: torch.Tensor | None,
    ) -> Projection:
        weight = projection.weight().clone()
        for first, update in updates:
            rows = weight[first : first + update.b.shape[1]]
            rows.copy_(merged_weight(rows, update))
        return self.projection(weight, bias)

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        layout: AttentionLayout,
    ) -> None:
        key_cache[layout.token_pages, :, layout.token_offsets] = key
        value_cache[layout.token_pages, :, layout.token_offsets] = value

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
        out = torch.empty_like(query)
        for sequence in range(len(layout.context_lengths)):
            start, stop = layout.query_starts[sequence], layout.query_starts[sequence + 1]
            out[start:stop] = attend_sequence(
                query[start:stop],
                *gather_sequence(key_cache, value_cache, layout, sequence),
                scale=scale,
                window=window,
                softcap=softcap,
            )
        return out

    def lora(self, x: torch.Tensor, bank: GroupedLora, slots: TokenSlots, out: torch.Tensor) -> None:
        for segment in slots.segments:
            lora_segment(x, bank, segment, out)

    def project_and_shrink(
        self, projection: Projection, x: torch.Tensor, bank: GroupedLora, slots: TokenSlots
    ) -> tuple[torch.Tensor, PendingExpand] | None:
        _, members, max_rank, _ = bank.a.shape
        hidden = x.new_zeros(x.shape[0], members, 1, max_rank)
        for segment in slots.segments:
            rows = slice(segment.start, segment.stop)
            for member, rank in enumerate(bank.ranks[segment.slot].tolist()):
                hidden[rows, member, 0, :rank] = x[rows] @ bank.a[segment.slot, member, :rank].t()
        tiles, _ = slot_tiles(slots.index.cpu().numpy())
        return projection(x), PendingExpand(hidden, bank, torch.from_numpy(tiles))

    def expand(self, pending: PendingExpand, out: torch.Tensor) -> None:
        bank, hidden = pending.bank, pending.hidden.sum(2).to(out.dtype)
        for start, count, slot in pending.tiles.tolist():
            rows = slice(start, start + count)
            for member, rank in enumerate(bank.ranks[slot].tolist()):
                columns = slice(bank.offsets[member], bank.offsets[member] + bank.widths[member])
                out[rows, columns] += hidden[rows, member, :rank] @ bank.b[member][slot, :rank]

    def bottleneck(
        self, stream: torch.Tensor, x: torch.Tensor, table: BottleneckTable, slots: TokenSlots
    ) -> None:
        for segment in slots.segments:
            bottleneck_segment(stream, x, table, segment)

    def bottleneck_and_expand(
        self,
        stream: torch.Tensor,
        x: torch.Tensor,
        table: BottleneckTable,
        slots: TokenSlots,
        pending: PendingExpand,
    ) -> None:
        self.expand(pending, x)
        self.bottleneck(stream, x, table, slots)


def gather_sequence(
    key_cache: torch.Tensor, value_cache: torch.Tensor, layout: AttentionLayout, sequence: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence's keys and values, each [kv_heads, context, head_dim], copied out of its pages."""
    length = layout.context_lengths[sequence]
    page_size = key_cache.shape[2]
    pages = layout.block_table[sequence, : -(-length // page_size)]

    def gather(cache: torch.Tensor) -> torch.Tensor:
        return cache[pages].transpose(0, 1).flatten(1, 2)[:, :length]

    return gather(key_cache), gather(value_cache)


def attend_sequence(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of the last [tokens, heads, head_dim] positions over [kv_heads, context, head_dim]."""
    num_queries, context = query.shape[0], keys.shape[1]
    past = context - num_queries
    whole = past == 0 and (window is None or window >= context)
    mask = None
    if not whole:
        positions = torch.arange(past, context, device=query.device)[:, None]
        seen = torch.arange(context, device=query.device)[None, :]
        mask = seen <= positions
        if window is not None:
            mask &= seen > positions - window
    q = query.transpose(0, 1)
    if softcap is None:
        attended = F.scaled_dot_product_attention(
            q[None], keys[None], values[None], attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=True
        )[0]
        return attended.transpose(0, 1)
    group = q.shape[0] // keys.shape[0]
    scores = q @ keys.repeat_interleave(group, dim=0).transpose(1, 2) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(num_queries, context, dtype=torch.bool, device=query.device).tril()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ values.repeat_interleave(group, dim=0)).transpose(0, 1)


def lora_segment(x: torch.Tensor, bank: GroupedLora, segment: Segment, out: torch.Tensor) -> None:
    """Two matrix products per member for one run of tokens (Hu et al., "LoRA", 2021)."""
    rows = x[segment.start : segment.stop]
    ranks: list[int] = bank.ranks[segment.slot].tolist()
    for member, rank in enumerate(ranks):
        if rank == 0:
            continue
        hidden = rows @ bank.a[segment.slot, member, :rank].t()
        columns = slice(bank.offsets[member], bank.offsets[member] + bank.widths[member])
        out[segment.start : segment.stop, columns] += hidden @ bank.b[member][segment.slot, :rank]


def bottleneck_segment(
    stream: torch.Tensor, x: torch.Tensor, table: BottleneckTable, segment: Segment
) -> None:
    """Two matrix products for one run of tokens (Houlsby et al., 2019)."""
    slot, size = segment.slot, int(table.sizes[segment.slot])
    if size == 0:
        return
    rows, layout = x[segment.start : segment.stop], int(table.layouts[slot])
    given = rows if layout == BottleneckLayout.HOULSBY else stream[segment.start : segment.stop]
    if layout == BottleneckLayout.PFEIFFER:
        given = given + rows
    hidden = F.linear(given, table.down[slot, :size], table.down_bias[slot, :size])
    hidden = _ACTIVATIONS[int(table.activations[slot])](hidden)
    update = torch.addmm(table.up_bias[slot], hidden, table.up[slot, :size])
    if table.residuals[slot]:
        rows += update
    else:
        rows.copy_(update)


_ACTIVATIONS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.RELU: F.relu,
    Activation.GELU: F.gelu,
    Activation.GELU_NEW: partial(F.gelu, approximate="tanh"),
    Activation.SILU: F.silu,
    Activation.TANH: torch.tanh,
    Activation.SIGMOID: torch.sigmoid,
    Activation.LEAKY_RELU: F.leaky_relu,
}
