"""The tensors that recorded steps read: everything that changes from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from hotswap_server.kernels import AttentionLayout, TokenSlots
from hotswap_server.kernels.interface import FEW_TOKENS, PROMPT_TILE, slot_tiles

_MAX_METHODS = 8
_IDS, _POSITIONS, _PAGES, _OFFSETS, _CONTEXT, _SOURCES, _LOGITS, _PROMPTS = range(8)
_PROMPT_FIELDS = 4
_COMMON = _PROMPTS + _PROMPT_FIELDS
_PER_SLOTS = 4  # rows for slots: their index and the three fields of their tiles
_PER_METHOD = 2 * _PER_SLOTS  # those of the tokens, and those of the rows with logits
_FEW = 4  # this part of the tokens is few tiles, where there are few tokens
_LEAST_TILES = 8  # of steps with more
_MORE_PROMPTS = 8  # tiles of prompts beyond those that fill a step


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a step with prompts has beside a decode step's: the `tiles` of `prompt_tiles`, `num_decode`
    sequences before theirs, and the tokens, `logit_rows` [rows], whose logits are wanted."""

    tiles: np.ndarray
    num_decode: int
    logit_rows: np.ndarray


_NO_PROMPTS = Prompts(np.zeros((0, _PROMPT_FIELDS), np.int32), 0, np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """A filled set of buffers: `size` tokens, and what the forward reads. The first `used` logits count.

    The ids are `flat[sources]`: those of `input_ids`, but where the host does not know a token yet, the one
    that the step before chose. `logit_rows` are the tokens that give logits, None for all.
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
    logit_rows: torch.Tensor | None = None


class StepBuffers:
    """The tensors on the device that graphs read, with their twins in pinned host memory.

    There are two of the latter in turn: one may be on its way to the device while the other is filled.
    `chosen` [sequences] int64 is for what a step chooses. Steps with prompts have up to `max_tokens`.
    """

    def __init__(
        self, *, max_sequences: int, max_pages: int, device: torch.device, max_tokens: int = 0
    ) -> None:
        pinned = device.type == "cuda"
        self._max_sequences = max_sequences
        numbers = (_COMMON + _PER_METHOD * _MAX_METHODS) * max(max_sequences, max_tokens)
        self._sides = [
            (
                torch.zeros(numbers, dtype=torch.int64, pin_memory=pinned),
                torch.zeros(max_sequences, max_pages, dtype=torch.int32, pin_memory=pinned),
            )
            for _ in range(2)
        ]
        self._device = torch.zeros(numbers + max_sequences, dtype=torch.int64, device=device)
        self.chosen = self._device[numbers:]
        self._tables_device = self._sides[0][1].to(device)
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
        prompts: Prompts | None = None,
    ) -> GraphInputs:
        """Copy the inputs of `len(ids)` tokens and pad them to `size`.

        `context` is of the sequences, and without `prompts` every token is one's own. The tokens of `chosen`
        have the one of that row of what the step before chose, whatever their id.
        """
        host, tables = self._sides[0]
        used = len(ids)
        for method in slots:
            self._methods.setdefault(method, len(self._methods))
        if len(self._methods) > _MAX_METHODS:
            raise RuntimeError(f"the step's buffers hold {_MAX_METHODS} methods")
        rows = _COMMON + _PER_METHOD * len(self._methods)
        array = host.numpy()[: rows * size].reshape(rows, size)
        device = self._device[: rows * size].view(rows, size)
        array[:_COMMON] = 0
        array[_PAGES, used:] = -1
        for row, values in enumerate((ids, positions, pages, offsets)):
            array[row, :used] = values
        decode = len(context) if prompts is None else prompts.num_decode
        array[_CONTEXT, :decode] = context[:decode]  # those of prompts are in their tiles
        array[_SOURCES] = np.arange(_IDS * size, (_IDS + 1) * size)
        for token, row in (chosen or {}).items():
            array[_SOURCES, token] = len(self._device) - self._max_sequences + row
        sequences = min(size, self._max_sequences)
        tiles_device = logit_rows = None
        if prompts is not None:
            array[_LOGITS, : len(prompts.logit_rows)] = prompts.logit_rows
            array[_PROMPTS:_COMMON, : len(prompts.tiles)] = prompts.tiles.T
            tiles_device = device[_PROMPTS:_COMMON, : prompt_capacity(size)].t()
            logit_rows = device[_LOGITS, :sequences]
        views = {}
        for method, index in slots.items():
            first = _COMMON + _PER_METHOD * self._methods[method]
            own, at_logits = (slice(first + n * _PER_SLOTS, first + (n + 1) * _PER_SLOTS) for n in range(2))
            views[method] = _slots(array[own], device[own], index, size)
            if prompts is not None:
                wanted = index[prompts.logit_rows]
                logits = _slots(array[at_logits], device[at_logits], wanted, sequences, levels=False)
                views[method] = replace(views[method], logits=logits)
        self._device[: rows * size].copy_(host[: rows * size], non_blocking=True)
        # Whole rows: a part of each would be a copy for every row.
        self._tables_device[: len(context)].copy_(tables[: len(context)], non_blocking=True)
        layout = AttentionLayout(
            num_decode=sequences,
            query_starts=range(sequences + 1),
            context_lengths=(),
            context=device[_CONTEXT, :sequences],
            block_table=self._tables_device[:sequences],
            token_pages=device[_PAGES],
            token_offsets=device[_OFFSETS],
            prompts=tiles_device,
        )
        return GraphInputs(
            size,
            used if prompts is None else len(prompts.logit_rows),
            device[_IDS, None],
            device[_POSITIONS, None],
            layout,
            views,
            merged,
            device[_SOURCES],
            self._device,
            logit_rows,
        )


def _slots(
    array: np.ndarray, device: torch.Tensor, index: np.ndarray, size: int, *, levels: bool = True
) -> TokenSlots:
    capacity = size
    array[0, : len(index)] = index
    array[0, len(index) : size] = -1
    tiles, rows = slot_tiles(array[0, :size])
    if levels:  # graphs for few tiles and for many: programs without one cost time as well
        capacity = _capacity(len(tiles), size)
    array[1:, : len(tiles)] = tiles.T
    array[1:, len(tiles) : size] = 0
    return TokenSlots(
        index=device[0, :size],
        rest=None,
        long=(),
        used=frozenset(tiles[:, 2].tolist()),
        tiles=device[1:, :capacity].t(),
        tile_rows=rows,
    )


def _capacity(tiles: int, size: int) -> int:
    if size <= FEW_TOKENS:
        return size if tiles > size // _FEW else max(1, size // _FEW)
    capacity = _LEAST_TILES
    while capacity < tiles:
        capacity *= _FEW
    return capacity


def prompt_capacity(size: int) -> int:
    """How many tiles of prompts a step of `size` tokens has room for."""
    return min(size, size // PROMPT_TILE + _MORE_PROMPTS)


def empty_inputs(buffers: StepBuffers, size: int, *, prompts: bool = False) -> GraphInputs:
    """Nothing but padding: no token is written and none attended to."""
    none = np.zeros(0, np.int64)
    return buffers.fill(
        size,
        ids=none,
        positions=none,
        pages=none,
        offsets=none,
        context=none,
        slots={},
        prompts=_NO_PROMPTS if prompts else None,
    )
