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

# Subtracting is accurate up to this ||W + B A|| / ||W||, and where no scale is smaller than that.
_MAX_GROWTH = {torch.float32: 4.0}
_MAX_GROWTH_16_BIT = 1.25
_MIN_SCALE = 0.25


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """What an adapter makes of one weight W [out_features, in_features]: `scale` * (W + `b`^T `a`).

    `a` [rank, in_features]; `b` [rank, out_features], the scaling in it; `scale` [out_features] of a DoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor | None = None


def merged_weight(weight: torch.Tensor, update: LowRankUpdate) -> torch.Tensor:
    """The updated weight in its own type and on its device, computed in float32."""
    a, b = (part.to(weight.device, torch.float32) for part in (update.a, update.b))
    merged = torch.addmm(weight.float(), b.t(), a)
    if update.scale is not None:
        merged.mul_(update.scale.to(weight.device, torch.float32)[:, None])
    return merged.to(weight.dtype)


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
) -> PreparedMerge:
    """Compute what merging `updates`, by module name, needs. Takes long, on any thread; changes nothing.

    Raises:
        MergeRefusedError: a module is no projection of the base, or its merged weight is not finite.
    """
    groups = list(groups)
    known = {name for group in groups for name in group.names}
    if unknown := sorted(set(updates) - known):
        raise MergeRefusedError(
            f"{ref}: {unknown[0]} is no linear layer inside the base's decoder, so it cannot be merged; "
            "serve the adapter batched, or merge it offline with `hotswap merge`"
        )
    with torch.inference_mode():
        swaps = tuple(
            _swap(ref, group, updates, state)
            for group in groups
            if any(name in updates for name in group.names)
        )
        if torch.cuda.is_available():  # what was begun here must be there when another stream reads it
            torch.cuda.current_stream().synchronize()
    return PreparedMerge(ref, swaps)


def _swap(
    ref: AdapterRef, group: ProjectionGroup, updates: Mapping[str, LowRankUpdate], state: StepState
) -> _Swap:
    parts, accurate = [], True
    for name in group.names:
        weight = group.weight_of(name)
        update = updates.get(name)
        if update is not None:
            merged = merged_weight(weight, update)
            if not merged.sum(dtype=torch.float32).isfinite():
                raise MergeRefusedError(f"{ref}: the merged weight of {name} is not finite", adapter=str(ref))
            accurate = accurate and _can_subtract(weight, merged, update)
            weight = merged
        parts.append(weight)
    weight = torch.cat(parts)
    correction: ProjectionDelta = _Recomputed(group, state)
    if accurate:
        correction = _Subtracted(group, updates, state, weight.device)
    return _Swap(group, state.kernels.projection(weight, group.bias), correction)


def _can_subtract(weight: torch.Tensor, merged: torch.Tensor, update: LowRankUpdate) -> bool:
    unscaled = merged.float()
    if update.scale is not None:
        scale = update.scale.to(weight.device, torch.float32)
        if float(scale.abs().min()) < _MIN_SCALE:
            return False
        unscaled = unscaled / scale[:, None]
    limit = _MAX_GROWTH.get(weight.dtype, _MAX_GROWTH_16_BIT)
    return float(unscaled.norm()) <= limit * float(weight.float().norm())


class _Recomputed:
    """Gives the rows of OTHERS what the base's own weights do."""

    def __init__(self, group: ProjectionGroup, state: StepState) -> None:
        self._group = group
        self._state = state

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        slots = self._state.slots.get(OTHERS)
        if slots is not None:
            torch.where(slots.index[:, None] < 0, out, self._group.base_projection(x), out=out)


class _Subtracted:
    """Takes the scale and the update back out of the rows of OTHERS."""

    def __init__(
        self,
        group: ProjectionGroup,
        updates: Mapping[str, LowRankUpdate],
        state: StepState,
        device: torch.device,
    ) -> None:
        own = [updates.get(name) for name in group.names]
        present = [update for update in own if update is not None]
        like, rank = present[0].a, max(update.a.shape[0] for update in present)
        a = like.new_zeros(1, len(own), rank, group.in_features, device=device)
        b = tuple(like.new_zeros(1, rank, width, device=device) for width in group.widths)
        ranks = torch.zeros(1, len(own), dtype=torch.int32)
        scale = torch.ones(sum(group.widths), dtype=torch.float32)
        for member, update in enumerate(own):
            if update is None:
                continue
            ranks[0, member] = update.a.shape[0]
            a[0, member, : update.a.shape[0]] = update.a
            b[member][0, : update.a.shape[0]] = -update.b
            if update.scale is not None:
                start = group.offsets[member]
                scale[start : start + group.widths[member]] = update.scale.float()
        self._state = state
        self._bank = GroupedLora(a, b, ranks.to(device), group.widths, group.offsets)
        self._bias = group.bias
        self._inverse: torch.Tensor | None = None
        if any(update.scale is not None for update in present):
            # The last row is what -1 means.
            self._inverse = torch.stack([1 / scale, torch.ones_like(scale)]).to(device)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        slots = self._state.slots.get(OTHERS)
        if slots is None:
            return
        if self._inverse is not None:
            rows = self._inverse[slots.index.long()]
            if self._bias is not None:  # which was not scaled
                out.copy_((out - self._bias) * rows + self._bias)
            else:
                out.copy_(out * rows)
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
