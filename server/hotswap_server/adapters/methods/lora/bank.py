"""Banks of LoRAs: tensors for each place of the base that an adapter has touched, and what they add there."""

from __future__ import annotations

from typing import Protocol

import torch

from hotswap_server.adapters.method import BankOptions
from hotswap_server.adapters.methods.lora.adapter import NAME, LoraAdapter
from hotswap_server.adapters.scales import FeatureTable, ScaleTable, ShiftTable
from hotswap_server.adapters.transfer import Writes
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.projection import ProjectionGroup
from hotswap_server.engine.sites import EmbeddingSite, OutputSite
from hotswap_server.kernels import GroupedLora, Projection, TokenSlots


class LoraBank:
    """All places of a base. A place's tensors are made when an adapter first touches it."""

    def __init__(self, base: BaseModel, options: BankOptions) -> None:
        self.num_slots = options.num_slots
        self._state = base.state
        self._places: list[_Place] = [
            *(_GroupPlace(base, options, group) for group in base.groups),
            *(_SitePlace(base, options, site) for site in base.biased),
        ]
        if base.embedding is not None:
            self._places.append(_EmbeddingPlace(base, options, base.embedding))

    def put(self, slot: int, adapter: LoraAdapter) -> None:
        writes = Writes()
        for place in self._places:
            place.put(slot, adapter, writes)
        writes.run()
        parts = {"weights": adapter.weights, "scales": adapter.scales, "shifts": adapter.shifts}
        touches = {(part, name) for part, values in parts.items() for name in values}
        self._state.mark(NAME, slot, touches)


def bank_bytes(base: BaseModel, options: BankOptions) -> int:
    """What a bank takes once adapters have touched all places, with factors and summands for each output."""
    slots, rank = options.num_slots, options.max_lora_rank
    elements = counts = 0
    for group in base.groups:
        width = sum(group.widths)
        elements += slots * rank * (len(group.names) * group.in_features + width)
        elements += 2 * FeatureTable.size(slots, width)
        counts += slots * len(group.names)
    for site in base.biased:
        elements += FeatureTable.size(slots, site.width)
    if base.embedding is not None:
        vocabulary, width = base.embedding.weight.shape[0], base.embedding.width
        elements += slots * rank * (vocabulary + rank + width) + FeatureTable.size(slots, width)
        counts += slots
    return elements * base.dtype.itemsize + counts * torch.int32.itemsize


class _Place(Protocol):
    def put(self, slot: int, adapter: LoraAdapter, writes: Writes) -> None: ...


class _Outputs:
    """Scales and shifts of some modules' outputs, side by side; with neither it takes no memory."""

    def __init__(
        self, base: BaseModel, num_slots: int, names: tuple[str, ...], widths: tuple[int, ...]
    ) -> None:
        self._base = base
        self._num_slots = num_slots
        self._columns = {name: sum(widths[:index]) for index, name in enumerate(names)}
        self._width = sum(widths)
        self._scales: ScaleTable | None = None
        self._shifts: ShiftTable | None = None

    def put(self, slot: int, adapter: LoraAdapter) -> None:
        if self._scales is None and any(name in adapter.scales for name in self._columns):
            self._scales = ScaleTable(self._base, self._num_slots, self._width)
        if self._shifts is None and any(name in adapter.shifts for name in self._columns):
            self._shifts = ShiftTable(self._base, self._num_slots, self._width)
        for table, values in ((self._scales, adapter.scales), (self._shifts, adapter.shifts)):
            if table is not None:
                table.reset(slot)
                for name, column in self._columns.items():
                    if name in values:
                        table.put(slot, column, values[name])

    @property
    def empty(self) -> bool:
        return self._scales is None and self._shifts is None

    def apply(self, slots: TokenSlots, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`bias` is the base's, already in `out`."""
        if self._scales is not None and (factors := self._scales.rows(slots)) is not None:
            out.mul_(factors)
            if bias is not None:  # which is not scaled
                out.sub_((factors - 1.0) * bias)
        if self._shifts is not None and (summands := self._shifts.rows(slots)) is not None:
            out.add_(summands)


class _GroupPlace:
    """Projections that share an input; the output embedding is one by itself."""

    def __init__(self, base: BaseModel, options: BankOptions, group: ProjectionGroup) -> None:
        self._base = base
        self._options = options
        self._group = group
        self._at_logits = group is base.head
        self._touched: frozenset[int] = frozenset()
        self._ranked: frozenset[int] = frozenset()
        self._bank: GroupedLora | None = None
        self._outputs = _Outputs(base, options.num_slots, group.names, group.widths)

    def put(self, slot: int, adapter: LoraAdapter, writes: Writes) -> None:
        names = self._group.names
        ranked = any(name in adapter.weights for name in names)
        if self._bank is None and ranked:
            self._bank = self._allocate()
        if self._bank is not None:
            ranks = [0] * len(names)
            for member, name in enumerate(names):
                if (weights := adapter.weights.get(name)) is not None:
                    a, b = weights
                    rank = ranks[member] = a.shape[0]
                    writes.add(self._bank.a[slot, member, :rank], a)
                    writes.add(self._bank.b[member][slot, :rank], b)
            writes.add_numbers(self._bank.ranks[slot], ranks)
        self._outputs.put(slot, adapter)
        self._ranked = _with(self._ranked, slot, ranked)
        self._touched = _with(self._touched, slot, ranked or any(name in adapter.shifts for name in names))
        if self._touched and self not in self._group.deltas:
            self._group.deltas.append(self)
            self._group.fused = self

    def project(self, projection: Projection, x: torch.Tensor) -> torch.Tensor | None:
        """See `FusedDelta`."""
        slots = self._base.state.slots_of(NAME, self._touched, at_logits=self._at_logits)
        if slots is None or self._bank is None or self._ranked.isdisjoint(slots.used):
            return None
        kernels, block = self._base.state.kernels, self._group.block
        found = kernels.project_and_shrink(projection, x, self._bank, slots)
        if found is None:
            return None
        out, pending = found
        # Other tokens' adapters of the block then need not wait for this half.
        if block is None or not self._outputs.empty or not block.leave(pending):
            kernels.expand(pending, out)
            self._outputs.apply(slots, out, self._group.bias)
        return out

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        slots = self._base.state.slots_of(NAME, self._touched, at_logits=self._at_logits)
        if slots is None:
            return
        if self._bank is not None and not self._ranked.isdisjoint(slots.used):
            self._base.state.kernels.lora(x, self._bank, slots, out)
        self._outputs.apply(slots, out, self._group.bias)

    def _allocate(self) -> GroupedLora:
        group, slots, rank = self._group, self._options.num_slots, self._options.max_lora_rank
        members = len(group.names)

        def empty(*shape: int) -> torch.Tensor:
            # Rows beyond a rank are never read, so on a CPU they never take memory either.
            return torch.empty(*shape, dtype=self._base.dtype, device=self._base.device)

        return GroupedLora(
            a=empty(slots, members, rank, group.in_features),
            b=tuple(empty(slots, rank, width) for width in group.widths),
            ranks=torch.zeros(slots, members, dtype=torch.int32, device=self._base.device),
            widths=group.widths,
            offsets=group.offsets,
        )


class _SitePlace:
    """A module with a bias that is no projection, such as a norm."""

    def __init__(self, base: BaseModel, options: BankOptions, site: OutputSite) -> None:
        self._state = base.state
        self._site = site
        self._touched: frozenset[int] = frozenset()
        self._outputs = _Outputs(base, options.num_slots, (site.name,), (site.width,))

    def put(self, slot: int, adapter: LoraAdapter, writes: Writes) -> None:
        self._outputs.put(slot, adapter)
        self._touched = _with(self._touched, slot, self._site.name in adapter.shifts)
        if self._touched and self not in self._site.deltas:
            self._site.deltas.append(self)

    def __call__(self, given: torch.Tensor, out: torch.Tensor) -> None:
        if (slots := self._state.slots_of(NAME, self._touched)) is not None:
            self._outputs.apply(slots, out, None)


class _EmbeddingPlace:
    """The token embedding: A's columns are looked up as the base's rows are; B goes on as any LoRA's does."""

    def __init__(self, base: BaseModel, options: BankOptions, site: EmbeddingSite) -> None:
        self._base = base
        self._options = options
        self._site = site
        self._touched: frozenset[int] = frozenset()
        # [slots, vocabulary, max_rank], zero beyond a rank.
        self._columns: torch.Tensor | None = None
        self._bank: GroupedLora | None = None
        self._outputs = _Outputs(base, options.num_slots, (site.name,), (site.width,))

    def put(self, slot: int, adapter: LoraAdapter, writes: Writes) -> None:
        weights = adapter.weights.get(self._site.name)
        if weights is not None:
            if self._columns is None or self._bank is None:
                self._columns, self._bank = self._allocate()
            a, b = weights
            rank = a.shape[0]
            self._columns[slot, :, :rank].copy_(a.t())
            self._columns[slot, :, rank:].zero_()
            self._bank.b[0][slot, :rank].copy_(b)
        if self._bank is not None:
            self._bank.ranks[slot, 0] = 0 if weights is None else weights[0].shape[0]
        self._outputs.put(slot, adapter)
        self._touched = _with(self._touched, slot, weights is not None)
        if self._touched and self not in self._site.deltas:
            self._site.deltas.append(self)

    def __call__(self, given: torch.Tensor, out: torch.Tensor) -> None:
        slots = self._base.state.slots_of(NAME, self._touched)
        if slots is None or self._columns is None or self._bank is None:
            return
        looked_up = self._columns[slots.index.clamp(min=0).long(), given]
        self._base.state.kernels.lora(looked_up, self._bank, slots, out)
        self._outputs.apply(slots, out, None)

    def _allocate(self) -> tuple[torch.Tensor, GroupedLora]:
        slots, rank, width = self._options.num_slots, self._options.max_lora_rank, self._site.width
        dtype, device = self._base.dtype, self._base.device
        bank = GroupedLora(
            # What was looked up is A x already.
            a=torch.eye(rank, dtype=dtype, device=device).expand(slots, 1, rank, rank).contiguous(),
            b=(torch.empty(slots, rank, width, dtype=dtype, device=device),),
            ranks=torch.zeros(slots, 1, dtype=torch.int32, device=device),
            widths=(width,),
            offsets=(0,),
        )
        vocabulary = self._site.weight.shape[0]
        return torch.zeros(slots, vocabulary, rank, dtype=dtype, device=device), bank


def _with(slots: frozenset[int], slot: int, present: bool) -> frozenset[int]:
    # A new set each time: a step may be reading the old one.
    return slots | {slot} if present else slots - {slot}
