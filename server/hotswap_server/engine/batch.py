"""The tensors of one step, in buffers that are allocated once."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Entries
from dataclasses import dataclass, field

import numpy as np
import torch

from hotswap_server.core import ScoreRequest
from hotswap_server.engine.attention import OTHERS
from hotswap_server.engine.buffers import GraphInputs, Prompts, StepBuffers, prompt_capacity
from hotswap_server.engine.scheduler import Scheduled
from hotswap_server.kernels import AttentionLayout, TokenSlots
from hotswap_server.kernels.interface import Segment, prompt_tiles, slot_tiles

# A run of this many tokens of one adapter is worth two matrix products of its own.
_LONG_RUN = 16


@dataclass(frozen=True, slots=True)
class StepInputs:
    """`input_ids` and `position_ids` [1, tokens] int64; `logit_rows` [rows] int64 are the tokens whose logits
    are needed, those of `entries` that produce any, in order; `rows_per_entry` counts them, and `chosen_at`
    is an entry's row among what the step chooses. `merged` says whether some token runs over merged weights;
    `slots` then have OTHERS for those that do not. `chosen` are tokens that the step before chose, by their
    places in `input_ids`: rows of what it chose."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    logit_rows: torch.Tensor
    rows_per_entry: list[int]
    chosen_at: list[int]
    layout: AttentionLayout
    slots: dict[str, TokenSlots]
    merged: bool = False
    graph: GraphInputs | None = None
    chosen: Mapping[int, int] = field(default_factory=dict)


class BatchBuilder:
    """Fills the same host buffers every step and copies them to the device's, where it is another.

    With `buffers`, steps of single tokens, up to the largest of `sizes`, are laid out in them for a graph;
    so are those with prompts, up to the largest of `prompt_sizes` tokens.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        max_sequences: int,
        max_pages: int,
        page_size: int,
        device: torch.device,
        buffers: StepBuffers | None = None,
        sizes: Entries[int] = (),
        prompt_sizes: Entries[int] = (),
    ) -> None:
        self._page_size = page_size
        self._device = device
        self._buffers = buffers
        self._sizes = sizes
        self._prompt_sizes = prompt_sizes
        self._ids = np.zeros(max_tokens, np.int64)
        self._positions = np.zeros(max_tokens, np.int64)
        self._pages = np.zeros(max_tokens, np.int64)
        self._offsets = np.zeros(max_tokens, np.int64)
        self._context = np.zeros(max_sequences, np.int32)
        self._tables = np.zeros((max_sequences, max_pages if buffers is None else 0), np.int32)

    def build(self, entries: Entries[Scheduled]) -> StepInputs:
        """Lay out `entries`, single tokens first, one after another."""
        starts = [0]
        rows: list[int] = []
        rows_per_entry: list[int] = []
        chosen: dict[int, int] = {}
        if self._buffers is not None:
            self._tables = self._buffers.turn()
        for index, entry in enumerate(entries):
            sequence, start = entry.sequence, starts[-1]
            first, stop = sequence.num_computed, sequence.num_computed + entry.num_new
            at = sequence.num_prefix_tokens + first
            span = slice(start, start + entry.num_new)
            known = sequence.token_ids[first:stop]
            if len(known) < entry.num_new:  # its last token is one that the step before chooses
                chosen[span.stop - 1] = sequence.chosen_at
                known.append(0)
            self._ids[span] = known
            table = self._tables[index]
            table[: len(sequence.pages)] = sequence.pages
            if entry.num_new == 1:
                self._positions[start] = at
                self._pages[start] = sequence.pages[at // self._page_size]
                self._offsets[start] = at % self._page_size
            else:
                positions = np.arange(at, at + entry.num_new)
                self._positions[span] = positions
                self._pages[span] = table[positions // self._page_size]
                self._offsets[span] = positions % self._page_size
            self._context[index] = at + entry.num_new
            wanted = _logit_positions(entry)
            rows.extend(range(start + wanted.start - first, start + wanted.stop - first))
            rows_per_entry.append(len(wanted))
            starts.append(span.stop)
        tokens, num_decode = starts[-1], sum(entry.num_new == 1 for entry in entries)
        context, prompts = self._context[: len(entries)], None
        if num_decode < len(entries) and (self._buffers is not None or self._device.type != "cpu"):
            tiles = prompt_tiles(starts, context.tolist(), num_decode)
            prompts = Prompts(tiles, num_decode, np.array(rows, np.int64))
        if self._buffers is not None:
            graph = self._graph_inputs(self._buffers, entries, starts, rows, rows_per_entry, chosen, prompts)
            if graph is not None:
                return graph
        layout = AttentionLayout(
            num_decode=num_decode,
            query_starts=starts,
            context_lengths=context.tolist(),
            context=self._tensor(context),
            block_table=self._tensor(self._tables[: len(entries)]),
            token_pages=self._tensor(self._pages[:tokens]),
            token_offsets=self._tensor(self._offsets[:tokens]),
            prompts=None if prompts is None else self._tensor(prompts.tiles),
        )
        return StepInputs(
            input_ids=self._tensor(self._ids[:tokens])[None],
            position_ids=self._tensor(self._positions[:tokens])[None],
            logit_rows=self._tensor(np.array(rows, np.int64)),
            rows_per_entry=rows_per_entry,
            chosen_at=_first_rows(rows_per_entry),
            layout=layout,
            slots=self._token_slots(entries, starts),
            merged=any(entry.sequence.merged for entry in entries),
            chosen=chosen,
        )

    def _graph_inputs(
        self,
        buffers: StepBuffers,
        entries: Entries[Scheduled],
        starts: list[int],
        rows: list[int],
        rows_per_entry: list[int],
        chosen: dict[int, int],
        prompts: Prompts | None,
    ) -> StepInputs | None:
        """The same for a graph; None where there is none for such a step."""
        tokens, sizes = starts[-1], self._sizes if prompts is None else self._prompt_sizes
        if not sizes or tokens > sizes[-1]:
            return None
        size = sizes[bisect.bisect_left(sizes, tokens)]
        if prompts is not None and (max(rows_per_entry) > 1 or len(prompts.tiles) > prompt_capacity(size)):
            return None
        inputs = buffers.fill(
            size,
            ids=self._ids[:tokens],
            positions=self._positions[:tokens],
            pages=self._pages[:tokens],
            offsets=self._offsets[:tokens],
            context=self._context[: len(entries)],
            slots=self._slot_indices(entries, starts),
            merged=any(entry.sequence.merged for entry in entries),
            chosen=chosen,
            prompts=prompts,
        )
        # A decode step's graph gives logits for all, one with prompts for those that are wanted.
        logit_rows, chosen_at = rows, list(range(len(entries)))
        if prompts is not None:
            logit_rows, chosen_at = list(range(len(rows))), _first_rows(rows_per_entry)
        return StepInputs(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            logit_rows=torch.tensor(logit_rows, dtype=torch.long),
            rows_per_entry=rows_per_entry,
            chosen_at=chosen_at,
            layout=inputs.layout,
            slots=inputs.slots,
            merged=inputs.merged,
            graph=inputs,
        )

    def _token_slots(self, entries: Entries[Scheduled], starts: list[int]) -> dict[str, TokenSlots]:
        indices = self._slot_indices(entries, starts)
        return {method: token_slots(index, self._device) for method, index in indices.items()}

    def _slot_indices(self, entries: Entries[Scheduled], starts: list[int]) -> dict[str, np.ndarray]:
        result: dict[str, np.ndarray] = {}
        slots = [None if entry.sequence.merged else entry.sequence.slot for entry in entries]
        methods = {e.sequence.method for e, slot in zip(entries, slots, strict=True) if slot is not None}
        for method in methods:
            index = result[method] = np.full(starts[-1], -1, np.int32)
            for entry, slot, start in zip(entries, slots, starts, strict=False):
                if slot is not None and entry.sequence.method == method:
                    index[start : start + entry.num_new] = slot
        merged = [entry.sequence.merged for entry in entries]
        if any(merged) and not all(merged):
            result[OTHERS] = np.repeat(np.where(merged, -1, 0).astype(np.int32), np.diff(starts))
        return result

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(array)
        return host if self._device.type == "cpu" else host.to(self._device, non_blocking=True)


def _first_rows(rows_per_entry: list[int]) -> list[int]:
    """Of each entry, the first of its rows among those of all."""
    return list(itertools.accumulate(rows_per_entry, initial=0))[:-1]


def token_slots(index: np.ndarray, device: torch.device) -> TokenSlots:
    """`index` [tokens] int32 with its long runs split off, or on a GPU in tiles."""
    if device.type != "cpu":
        tiles, rows = slot_tiles(index)
        return TokenSlots(
            # From memory that is not pinned: the call returns once it has been read.
            index=torch.from_numpy(index).to(device, non_blocking=True),
            rest=None,
            long=(),
            used=frozenset(tiles[:, 2].tolist()),
            tiles=torch.from_numpy(tiles).to(device, non_blocking=True),
            tile_rows=rows,
        )
    bounds = np.flatnonzero(np.diff(index)) + 1
    edges = [0, *bounds.tolist(), len(index)]
    long = tuple(
        Segment(start, stop, int(index[start]))
        for start, stop in itertools.pairwise(edges)
        if stop - start >= _LONG_RUN and index[start] >= 0
    )
    rest = index.copy() if long else index
    for segment in long:
        rest[segment.start : segment.stop] = -1
    return TokenSlots(
        index=torch.from_numpy(index).to(device),
        rest=torch.from_numpy(rest).to(device) if (rest >= 0).any() else None,
        long=long,
        used=frozenset(index[edges[:-1]].tolist()) - {-1},
    )


def _logit_positions(entry: Scheduled) -> range:
    """The positions, among those this step computes, whose next-token distribution is needed."""
    sequence = entry.sequence
    first, stop = sequence.num_computed, sequence.num_computed + entry.num_new
    if isinstance(sequence.request, ScoreRequest):
        return range(
            max(first, sequence.request.score_from - 1), max(first, min(stop, sequence.num_tokens - 1))
        )
    return range(stop - 1, stop) if stop == sequence.num_tokens else range(stop, stop)
