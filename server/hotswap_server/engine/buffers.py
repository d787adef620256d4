"""The tensors that recorded steps read: everything that changes from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from hotswap_server.kernels import AttentionLayout, TokenSlots
from hotswap_server.kernels.interface import slot_tiles

_MAX_METHODS = 8
_IDS, _POSITIONS, _PAGES, _OFFSETS, _CONTEXT, _SOURCES = range(6)
_COMMON, _PER_METHOD = 6, 4  # rows of the buffer: of each method, its index and the three fields of its tiles
_FEW = 4  # this part of the batch size is few tiles
_TILE_ROWS = 4  # enough for one adapter's weights to be read a few times only, and few to go through


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """A filled set of buffers: `size` rows, of which the first `used` count, and what the forward reads.

    The ids are `flat[sources]`: those of `input_ids`, but where the host does not know a token yet, the one
    that the step before chose.
    """

    size: int
    used: int
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: AttentionLayout
    slots: dict[str, TokenSlots]
    merged: bool
    sources: torch.Tensor
    flat: torch.Tensor


class StepBuffers:
    """The tensors on the device that graphs read, with their twins in pinned host memory.

    There are two of the latter in turn: one may be on its way to the device while the other is filled.
    `chosen` [sequences] int64 is for what a step chooses.
    """

    def __init__(self, *, max_sequences: int, max_pages: int, device: torch.device) -> None:
        rows = _COMMON + _PER_METHOD * _MAX_METHODS
        pinned = device.type == "cuda"
        self._max_sequences = max_sequences
        self._sides = [
            (
                torch.zeros(rows, max_sequences, dtype=torch.int64, pin_memory=pinned),
                torch.zeros(max_sequences, max_pages, dtype=torch.int32, pin_memory=pinned),
            )
            for _ in range(2)
        ]
        self._device = torch.zeros(rows + 1, max_sequences, dtype=torch.int64, device=device)
        self.chosen = self._device[rows]
        self._tables_device = self._sides[0][1].to(device)
        self._own_ids = np.arange(max_sequences) + _IDS * max_sequences
        self._methods: dict[str, int] = {}

    def turn(self) -> np.ndarray:
        """Begin a step on the other side: its page tables [sequences, pages], to be written before `fill`."""
        self._sides.reverse()
        return self._sides[0][1].numpy()

    def fill(
        self,
        size: int,
        *,
        ids: np.ndarray,
        positions: np.ndarray,
        pages: np.ndarray,
        offsets: np.ndarray,
        context: np.ndarray,
        slots: dict[str, np.ndarray],
        merged: bool = False,
        chosen: Mapping[int, int] | None = None,
    ) -> GraphInputs:
        """Copy the inputs of `len(ids)` tokens, each of its own sequence, and pad them to `size`.

        Those of `chosen` have the token of that row of what the step before chose, whatever their id.
        """
        host, tables = self._sides[0]
        used, array = len(ids), host.numpy()
        array[:_COMMON, used:size] = 0
        array[_PAGES, used:size] = -1
        for row, values in enumerate((ids, positions, pages, offsets, context)):
            array[row, :used] = values
        array[_SOURCES, :size] = self._own_ids[:size]
        for index, row in (chosen or {}).items():
            array[_SOURCES, index] = (len(self._device) - 1) * self._max_sequences + row
        views = {method: self._fill_slots(array, method, index, size) for method, index in slots.items()}
        rows = _COMMON + _PER_METHOD * len(self._methods)
        self._device[:rows].copy_(host[:rows], non_blocking=True)
        # Whole rows: a part of each would be a copy for every row.
        self._tables_device[:used].copy_(tables[:used], non_blocking=True)
        device = self._device
        layout = AttentionLayout(
            num_decode=size,
            query_starts=range(size + 1),
            context_lengths=(),
            context=device[_CONTEXT, :size],
            block_table=self._tables_device[:size],
            token_pages=device[_PAGES, :size],
            token_offsets=device[_OFFSETS, :size],
        )
        return GraphInputs(
            size,
            used,
            device[_IDS, None, :size],
            device[_POSITIONS, None, :size],
            layout,
            views,
            merged,
            device[_SOURCES, :size],
            device.view(-1),
        )

    def _fill_slots(self, array: np.ndarray, method: str, index: np.ndarray, size: int) -> TokenSlots:
        number = self._methods.setdefault(method, len(self._methods))
        if number >= _MAX_METHODS:
            raise RuntimeError(f"the step's buffers hold {_MAX_METHODS} methods")
        first = _COMMON + _PER_METHOD * number
        own = array[first : first + _PER_METHOD]
        own[0, : len(index)] = index
        own[0, len(index) : size] = -1
        tiles, _ = slot_tiles(index, _TILE_ROWS)
        own[1:, : len(tiles)] = tiles.T
        own[1:, len(tiles) : size] = 0
        # Graphs for few tiles and for many: programs without one cost time as well.
        capacity = size if len(tiles) > size // _FEW else max(1, size // _FEW)
        there = self._device[first : first + _PER_METHOD, :size]
        return TokenSlots(
            index=there[0],
            rest=None,
            long=(),
            used=frozenset(tiles[:, 2].tolist()),
            tiles=there[1:, :capacity].t(),
            tile_rows=_TILE_ROWS,
        )


def empty_inputs(buffers: StepBuffers, size: int) -> GraphInputs:
    """Nothing but padding: no token is written and none attended to."""
    none = np.zeros(0, np.int64)
    return buffers.fill(size, ids=none, positions=none, pages=none, offsets=none, context=none, slots={})
