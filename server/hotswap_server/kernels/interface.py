"""What a set of kernels offers, and the tensors it works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch

PROMPT_TILE = 64
"""Queries of one sequence that a GPU's program for prompts takes at most."""

FEW_TOKENS = 64
"""Up to so many of a step, a GPU's kernels read adapters' weights for a few tokens at a time."""

_FEW_TILE, _SMALL_TILE, _LARGE_TILE = 4, 16, 64


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `[start, stop)` of the batch that use `slot` of a bank."""

    start: int
    stop: int
    slot: int


@dataclass(frozen=True, slots=True)
class TokenSlots:
    """Which row of one method's bank each token uses.

    `index` is [tokens] int32, -1 where the token has no adapter of this method. `long` are runs of tokens
    that pay for a matrix product of their own; `rest` is `index` without them (-1 there), None when nothing
    remains. `used` has every slot in `index`, and may have more: whoever changes none of these is not run.
    On a GPU `tiles` [tiles, 3] are those of `slot_tiles`, of up to `tile_rows` tokens each; one of no tokens
    is to be passed over. `logits` is the same for the rows that the output embedding sees, where that is
    known beforehand.
    """

    index: torch.Tensor
    rest: torch.Tensor | None
    long: tuple[Segment, ...]
    used: frozenset[int]
    tiles: torch.Tensor | None = None
    tile_rows: int = 0
    logits: TokenSlots | None = None

    def at(self, rows: torch.Tensor) -> TokenSlots:
        """The same for `rows` [rows] int64, those that the output embedding sees. Waits for no device."""
        if self.logits is not None:
            return self.logits
        index = self.index[rows]
        return TokenSlots(index=index, rest=index, long=(), used=self.used)

    def rows_of(self, table: torch.Tensor) -> torch.Tensor:
        """The row of `table` [slots + 1, features] that each token uses, the last one for -1."""
        # Between large products, where nothing is cached, indexing by a tensor takes more than twice as long.
        return torch.index_select(table, 0, self.index.remainder(len(table)))

    @property
    def segments(self) -> list[Segment]:
        """All runs of equal slots, for references that loop."""
        slots: list[int] = self.index.tolist()
        runs: list[Segment] = []
        start = 0
        for stop in range(1, len(slots) + 1):
            if stop == len(slots) or slots[stop] != slots[start]:
                if slots[start] >= 0:
                    runs.append(Segment(start, stop, slots[start]))
                start = stop
        return runs


@dataclass(frozen=True, slots=True)
class GroupedLora:
    """The LoRA bank of projections that share one input.

    `a` [slots, members, max_rank, in_features]; `b`, one per member, [slots, max_rank, out_features], already
    multiplied by the scaling; `ranks` [slots, members] int32, 0 where an adapter leaves a member alone. Rows
    beyond a rank are uninitialised and must not be read. `offsets` are the members' columns in the output.
    """

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]
    ranks: torch.Tensor
    widths: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PendingExpand:
    """The wide halves of LoRAs that an output [tokens, sum of the bank's widths] still lacks.

    `hidden` [tokens, members, parts, max_rank] float32 are the narrow halves, to be summed over `parts`;
    `tiles` are those of the `TokenSlots`.
    """

    hidden: torch.Tensor
    bank: GroupedLora
    tiles: torch.Tensor


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """What an adapter makes of a linear layer's W [out_features, in_features]: `scale` * (W + `b`^T `a`).

    `a` [rank, in_features]; `b` [rank, out_features], the scaling in it; `scale` [out_features] of a DoRA;
    `shift` [out_features] is added to the bias. Rank 0 leaves the weight alone.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class FourBitWeight:
    """A weight [out_features, in_features] in 4 bits, as bitsandbytes packs it, with its scales resolved.

    `packed` [out_features, in_features / 2] uint8 has the first of two inputs in the upper half of a byte;
    `values` are what the 16 codes stand for, in `code` [16] float32 too. `scales` [in_features / `chunk`,
    out_features] float32 are what they are multiplied by; `chunk` is the block of the quantisation, or less
    where a row does not end with one.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    code: torch.Tensor
    values: tuple[float, ...]
    chunk: int
    dtype: torch.dtype
    """What the weight is of, unpacked."""

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes


class FourBitSource(Protocol):
    """A projection that may be in 4 bits; `nbytes` is the memory of its weight and scales."""

    @property
    def nbytes(self) -> int: ...

    def resolved(self) -> FourBitWeight | None:
        """Its weight, None if it is held otherwise."""
        ...


class Activation(IntEnum):
    """The functions of bottleneck adapters, numbered as in bottleneck.c."""

    RELU = 0
    GELU = 1
    GELU_NEW = 2
    SILU = 3
    TANH = 4
    SIGMOID = 5
    LEAKY_RELU = 6


class BottleneckLayout(IntEnum):
    """What a bottleneck adapter reads: x, x + the residual stream, or the residual stream alone."""

    HOULSBY = 0
    PFEIFFER = 1
    PARALLEL = 2


@dataclass(frozen=True, slots=True)
class BottleneckTable:
    """The bottleneck bank of one block.

    `down` and `up` are [slots, max_size, hidden_size], `down_bias` [slots, max_size] and `up_bias`
    [slots, hidden_size]; `up` and its bias are multiplied by the scaling already. `sizes` [slots] int32 is 0
    where an adapter leaves the block alone; rows beyond it are uninitialised and must not be read.
    `activations`, `layouts` and `residuals` [slots] int32 hold an `Activation`, a `BottleneckLayout`, and
    whether x itself stays.
    """

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    sizes: torch.Tensor
    activations: torch.Tensor
    layouts: torch.Tensor
    residuals: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Where the sequences of a step are.

    The first `num_decode` sequences have one query token each, and those tokens come first in the batch.
    `block_table` [sequences, max_pages] int32; `context` [sequences] int32 counts the tokens that a
    sequence's last query sees, itself included; `query_starts` has the first token of each, and the end.
    `token_pages` and `token_offsets` [tokens] int64 say where the keys and values of the new tokens go. On a
    GPU a sequence may be padding, with a context of 0 and a page of -1, and `prompts` are the `prompt_tiles`.
    """

    num_decode: int
    query_starts: Sequence[int]
    context_lengths: Sequence[int]
    context: torch.Tensor
    block_table: torch.Tensor
    token_pages: torch.Tensor
    token_offsets: torch.Tensor
    prompts: torch.Tensor | None = None


class Projection(Protocol):
    """A linear layer prepared for inference: x [tokens, in_features] -> [tokens, out_features]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def weight(self) -> torch.Tensor:
        """The weight [out_features, in_features], bit for bit as it was given; if quantised, dequantised."""
        ...


class FusedProjection(Projection, Protocol):
    """One projection of several; `nbytes` is the memory of its weight and scales."""

    @property
    def nbytes(self) -> int: ...


class Kernels(Protocol):
    """The operations that differ between devices."""

    name: str
    can_be_recorded: bool
    """Whether a CUDA graph can hold them: they read nothing on the host that changes between steps."""

    def projection(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
        """Prepare `weight` [out_features, in_features]; the caller may free it afterwards."""
        ...

    def four_bit(self, members: Sequence[FourBitSource], bias: torch.Tensor | None) -> FusedProjection | None:
        """One projection of all `members`, whose weights are copied, with `bias`; None if they stay apart."""
        ...

    def merged(
        self,
        projection: Projection,
        updates: Sequence[tuple[int, LowRankUpdate]],
        bias: torch.Tensor | None,
    ) -> Projection:
        """`projection` with `bias` and with each update made to the rows of its weight from the given one on.

        Updates are in order and apart. Nothing is changed; takes long, so threads of a step are left alone.
        """
        ...

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        layout: AttentionLayout,
    ) -> None:
        """Put `key` and `value` [tokens, kv_heads, head_dim] into their pages."""
        ...

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
        """Causal attention of `query` [tokens, heads, head_dim] over pages that already hold the new tokens.

        Caches are [pages, kv_heads, page_size, head_dim]. `window` tokens are seen at most, itself included.
        Returns [tokens, heads, head_dim].
        """
        ...

    def lora(self, x: torch.Tensor, bank: GroupedLora, slots: TokenSlots, out: torch.Tensor) -> None:
        """Add each token's low-rank update of `x` [tokens, in_features] to `out` [tokens, sum of widths]."""
        ...

    def project_and_shrink(
        self, projection: Projection, x: torch.Tensor, bank: GroupedLora, slots: TokenSlots
    ) -> tuple[torch.Tensor, PendingExpand] | None:
        """`projection` of `x` and, computed beside it, what `expand` makes of that what `lora` would.

        None if the two are better one after another.
        """
        ...

    def expand(self, pending: PendingExpand, out: torch.Tensor) -> None:
        """Add to `out` [tokens, sum of widths] what it lacks."""
        ...

    def bottleneck(
        self, stream: torch.Tensor, x: torch.Tensor, table: BottleneckTable, slots: TokenSlots
    ) -> None:
        """Make of `x`, a block's output, in place what each token's adapter makes of it.

        `x` and `stream`, the residual stream, are [tokens, hidden_size] and contiguous.
        """
        ...

    def bottleneck_and_expand(
        self,
        stream: torch.Tensor,
        x: torch.Tensor,
        table: BottleneckTable,
        slots: TokenSlots,
        pending: PendingExpand,
    ) -> None:
        """`bottleneck` and `expand` of `x` at once: no token may have both an adapter of each."""
        ...


def prompt_tiles(starts: Sequence[int], contexts: Sequence[int], num_decode: int) -> np.ndarray:
    """The query tokens of sequences from `num_decode` on, in tiles of up to PROMPT_TILE of one sequence.

    [tiles, 4] int32: sequence, first token in the batch, number of tokens, and the first one's position.
    """
    tiles = [
        (
            sequence,
            token,
            min(PROMPT_TILE, starts[sequence + 1] - token),
            token - starts[sequence + 1] + length,
        )
        for sequence, length in enumerate(contexts)
        if sequence >= num_decode
        for token in range(starts[sequence], starts[sequence + 1], PROMPT_TILE)
    ]
    return np.array(tiles, np.int32).reshape(-1, 4)


def slot_tiles(index: np.ndarray) -> tuple[np.ndarray, int]:
    """The tokens that have a slot, in tiles of one slot's, and how many a tile has at most.

    `index` is that of `TokenSlots`; the tiles are [tiles, 3] int32: first token, number of tokens, slot.
    """
    bounds = np.flatnonzero(np.diff(index)) + 1
    starts = np.concatenate(([0], bounds))
    stops = np.concatenate((bounds, [len(index)]))
    used = index[starts] >= 0
    starts, stops = starts[used], stops[used]
    if len(index) <= FEW_TOKENS:
        # Few to go through one after another, enough for a weight to be read a few times only.
        rows = _FEW_TILE
    else:
        rows = _LARGE_TILE if len(starts) and (stops - starts).max() > _SMALL_TILE else _SMALL_TILE
    counts = -(-(stops - starts) // rows)
    run = np.repeat(np.arange(len(starts)), counts)
    first = starts[run] + (np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows
    tiles = np.stack((first, np.minimum(rows, stops[run] - first), index[starts[run]]), axis=1)
    return tiles.astype(np.int32), rows
