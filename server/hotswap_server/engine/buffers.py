"""The tensors that recorded steps read: everything that changes from one step to the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hotswap_server.kernels import AttentionLayout, TokenSlots
from hotswap_server.kernels.interface import slot_tiles

_MAX_METHODS = 8
_IDS, _POSITIONS, _PAGES, _OFFSETS, _CONTEXT = range(5)
_COMMON, _PER_METHOD = 5, 4  # rows of the buffer: of each method, its index and the three fields of its tiles
_FEW = 4  # this part of the batch size is few tiles
_TILE_ROWS = 4  # enough for one adapter's weights to be read a few times only, and few to go through


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """A filled set of buffers: `size` rows, of which the first `used` count, and what the forward reads."""

    size: int
    used: int
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: AttentionLayout
    slots: dict[str, TokenSlots]
    merged: bool


class StepBuffers:
    """The tensors on the device that graphs read, with their twins in pinned host memory."""

    def __init__(self, *, max_sequences: int, max_pages: int, device: torch.device) -> None:
        rows = _COMMON + _PER_METHOD * _MAX_METHODS
        self._host = torch.zeros(rows, max_sequences, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._array = self._host.numpy()
        self._device = self._host.to(device)
        self._tables_host = torch.zeros(
            max_sequences, max_pages, dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self.tables = self._tables_host.numpy()
        """Of the pages of each sequence [sequences, pages], to be written before `fill`."""
        self._tables_device = self._tables_host.to(device)
        self._methods: dict[str, int] = {}

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
    ) -> GraphInputs:
        """Copy the inputs of `len(ids)` tokens, each of its own sequence, and pad them to `size`."""
        used, array = len(ids), self._array
        array[:_COMMON, used:size] = 0
        array[_PAGES, used:size] = -1
        for row, values in enumerate((ids, positions, pages, offsets, context)):
            array[row, :used] = values
        views = {method: self._fill_slots(method, index, size) for method, index in slots.items()}
        rows = _COMMON + _PER_METHOD * len(self._methods)
        self._device[:rows].copy_(self._host[:rows], non_blocking=True)
        # Whole rows: a part of each would be a copy for every row.
        self._tables_device[:used].copy_(self._tables_host[:used], non_blocking=True)
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
            size, used, device[_IDS, None, :size], device[_POSITIONS, None, :size], layout, views, merged
        )

    def _fill_slots(self, method: str, index: np.ndarray, size: int) -> TokenSlots:
        number = self._methods.setdefault(method, len(self._methods))
        if number >= _MAX_METHODS:
            raise RuntimeError(f"the step's buffers hold {_MAX_METHODS} methods")
        first = _COMMON + _PER_METHOD * number
        own = self._array[first : first + _PER_METHOD]
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
