"""An adapter in the base's own weights: what is swapped in, and what frees other requests' rows from it.

While W' = s (W + B A) stands where W stood (`s` of a DoRA, else 1), the adapter's own rows cost what the
base's do. Other rows of the same step get (W' x) / s - B A x, first of all that changes them, on the very
rows that the product was given; so what other methods add or scale afterwards meets W x. A step without a row
of the adapter runs over the base's own weights, which stay as they are: nothing is ever added back.

What that costs in accuracy (relative error of the output of a layer 576 to 1536 against float64, rank 16; the
update as large as a tenth of W, as W, as ten times W):

float32   the base alone 4.3e-7; other rows 4.4e-7, 6.4e-7, 4.8e-6
bfloat16  the base alone 1.7e-3; other rows 2.9e-3, 4.5e-3, 3.2e-2; merged against
          batched rows 3.3e-3, 3.6e-3, 3.8e-3

So in bfloat16 other rows are off by as much as PEFT's merged model is from its unmerged one, as long as the
update is smaller than W; rounding W' and its product makes most of that. A subtraction in float32 was tried
and gave 2.9e-3, 3.8e-3 and 2.3e-2, too little for what it costs. Where subtracting would be less accurate
than that, other rows are computed from the base's own weights, which costs a second product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from hotswap_server.core import AdapterRef
from hotswap_server.engine.attention import StepState
from hotswap_server.engine.projection import ProjectionDelta, ProjectionGroup
from hotswap_server.errors import MergeRefusedError
from hotswap_server.kernels import GroupedLora, Projection

OTHERS = "others-of-merged"
"""Key in a step's slots of the rows that do not use the merged adapter: slot 0; the others -1."""
_OTHERS_SLOTS = frozenset({0})

# Subtracting is accurate up to this ||W + B A|| / ||W||, and where no scale is smaller than that.
_MAX_GROWTH = {torch.float32: 4.0}
_MAX_GROWTH_16_BIT = 1.25
_MIN_SCALE = 0.25
_ROWS = 4096  # of a weight, in float32 at a time


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


@dataclass(frozen=True, slots=True)
class _Swap:
    group: ProjectionGroup
    projection: Projection
    correction: ProjectionDelta


@dataclass(frozen=True, slots=True)
class PreparedMerge:
    """The weights of one merge, complete and checked, not in use yet."""

    ref: AdapterRef
    swaps: tuple[_Swap, ...]


def prepare_merge(
    ref: AdapterRef,
    updates: Mapping[str, LowRankUpdate],
    groups: Iterable[ProjectionGroup],
    state: StepState,
    *,
    head: ProjectionGroup | None = None,
) -> PreparedMerge:
    """Compute what merging `updates`, by module name, needs. Takes long, on any thread; changes nothing.

    `head` is the one of `groups` that sees the step's logit rows alone.

    Raises:
        MergeRefusedError: a module is no projection of the base, or its merged weight is not finite.
    """
    groups = list(groups)
    known = {name for group in groups for name in group.names}
    if unknown := sorted(set(updates) - known):
        raise MergeRefusedError(
            f"{ref} changes {unknown[0]}, which is no linear layer: its output cannot be freed from that for "
            "other requests. Serve the adapter batched, or merge it offline with `hotswap merge`",
            adapter=str(ref),
        )
    with torch.inference_mode():
        swaps = tuple(
            _swap(ref, group, updates, state, group is head)
            for group in groups
            if any(name in updates for name in group.names)
        )
        if torch.cuda.is_available():  # what was begun here must be there when another stream reads it
            torch.cuda.current_stream().synchronize()
    return PreparedMerge(ref, swaps)


def _swap(
    ref: AdapterRef,
    group: ProjectionGroup,
    updates: Mapping[str, LowRankUpdate],
    state: StepState,
    at_logits: bool,
) -> _Swap:
    parts, shifts, accurate = [], [], True
    for name, width in zip(group.names, group.widths, strict=True):
        weight = group.weight_of(name)
        update = updates.get(name)
        if update is not None:
            merged = merged_weight(weight, update)
            if not merged.sum(dtype=torch.float32).isfinite():
                raise MergeRefusedError(f"{ref}: the merged weight of {name} is not finite", adapter=str(ref))
            accurate = accurate and _can_subtract(weight, merged, update)
            weight = merged
        parts.append(weight)
        shift = None if update is None else update.shift
        shifts.append(weight.new_zeros(width) if shift is None else shift.to(weight))
    weight, bias = torch.cat(parts), group.bias
    if any(name in updates and updates[name].shift is not None for name in group.names):
        bias = torch.cat(shifts) if bias is None else bias + torch.cat(shifts)
    correction: ProjectionDelta = _Recomputed(group, state, at_logits)
    if accurate:
        correction = _Subtracted(group, updates, bias, state, at_logits)
    return _Swap(group, state.kernels.projection(weight, bias), correction)


def _can_subtract(weight: torch.Tensor, merged: torch.Tensor, update: LowRankUpdate) -> bool:
    scale = torch.ones(1, 1)
    if update.scale is not None:
        scale = update.scale.float()[:, None]
        if float(scale.abs().min()) < _MIN_SCALE:
            return False
    norms = torch.zeros(2)
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        unscaled = merged[rows].float() / (scale[rows] if scale.shape[0] > 1 else scale).to(merged.device)
        norms += torch.stack([unscaled.square().sum(), weight[rows].float().square().sum()]).cpu()
    after, before = norms.sqrt().tolist()
    return bool(after <= _MAX_GROWTH.get(weight.dtype, _MAX_GROWTH_16_BIT) * before)


class _Recomputed:
    """Gives the rows of OTHERS what the base's own weights do."""

    def __init__(self, group: ProjectionGroup, state: StepState, at_logits: bool) -> None:
        self._group = group
        self._state = state
        self._at_logits = at_logits

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        slots = self._state.slots_of(OTHERS, _OTHERS_SLOTS, at_logits=self._at_logits)
        if slots is not None:
            torch.where(slots.index[:, None] < 0, out, self._group.base_projection(x), out=out)


class _Subtracted:
    """Takes scale, update and shift back out of the rows of OTHERS. `bias` is the merged one."""

    def __init__(
        self,
        group: ProjectionGroup,
        updates: Mapping[str, LowRankUpdate],
        bias: torch.Tensor | None,
        state: StepState,
        at_logits: bool,
    ) -> None:
        self._state = state
        self._at_logits = at_logits
        own = [updates.get(name) for name in group.names]
        weight = group.weight_of(group.names[0])
        rank = max(1, *(0 if update is None else update.rank for update in own))
        a = weight.new_zeros(1, len(own), rank, group.in_features)
        b = tuple(weight.new_zeros(1, rank, width) for width in group.widths)
        ranks = torch.zeros(1, len(own), dtype=torch.int32)
        scale = torch.ones(sum(group.widths), dtype=torch.float32)
        for member, (update, start) in enumerate(zip(own, group.offsets, strict=True)):
            if update is None:
                continue
            ranks[0, member] = update.rank
            if update.rank:
                a[0, member, : update.rank] = update.a
                b[member][0, : update.rank] = -update.b
            if update.scale is not None:
                scale[start : start + group.widths[member]] = update.scale.float()
        self._bank = GroupedLora(a, b, ranks.to(weight.device), group.widths, group.offsets)
        # out * factor + summand; the last row is what -1 means.
        factors, summands = torch.ones(2, len(scale)), torch.zeros(2, len(scale))
        factors[0] = 1 / scale
        if bias is not None:
            before = torch.zeros(len(scale)) if group.bias is None else group.bias.float().cpu()
            summands[0] = before - bias.float().cpu() * factors[0]
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        if any(
            update is not None and (update.scale is not None or update.shift is not None) for update in own
        ):
            self._tables = factors.to(weight.device), summands.to(weight.device)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        slots = self._state.slots_of(OTHERS, _OTHERS_SLOTS, at_logits=self._at_logits)
        if slots is None:
            return
        if self._tables is not None:
            factors, summands = (table[slots.index.long()] for table in self._tables)
            out.copy_(torch.addcmul(summands, out.float(), factors))
        self._state.kernels.lora(x, self._bank, slots, out)


class MergedWeights:
    """Which adapter is in a base's weights. All but `ref` is for the engine's thread, between two steps."""

    def __init__(self) -> None:
        self._merge: PreparedMerge | None = None
        self._in_use = False

    @property
    def ref(self) -> AdapterRef | None:
        return None if self._merge is None else self._merge.ref

    def install(self, merge: PreparedMerge | None) -> PreparedMerge | None:
        """Let `merge` be the one that `use` means, or none; returns the one before."""
        self.use(False)
        before, self._merge = self._merge, merge
        return before

    def use(self, wanted: bool) -> None:
        """Run the coming steps over the merged weights, or over the base's own."""
        if self._merge is None or wanted is self._in_use:
            return
        for swap in self._merge.swaps:
            swap.group.run(swap.projection if wanted else None, swap.correction if wanted else None)
        self._in_use = wanted
