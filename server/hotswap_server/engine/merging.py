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
and gave 2.9e-3, 3.8e-3 and 2.3e-2, too little for what it costs. Where subtracting is seen to be worse than
`_TOLERANCE`, other rows are computed from the base's own weights, which costs a second product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hotswap_server.core import AdapterRef
from hotswap_server.engine.attention import OTHERS, StepState
from hotswap_server.engine.batch import token_slots
from hotswap_server.engine.projection import ProjectionDelta, ProjectionGroup
from hotswap_server.errors import MergeRefusedError
from hotswap_server.kernels import GroupedLora, LowRankUpdate, Projection, TokenSlots

if TYPE_CHECKING:
    from hotswap_server.engine.base import BaseModel

_OTHERS_SLOTS = frozenset({0})

# Error of subtracting, relative to a projection's output, up to which it is done.
_TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
_NUM_PROBES = 8


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


def prepare_merge(ref: AdapterRef, updates: Mapping[str, LowRankUpdate], base: BaseModel) -> PreparedMerge:
    """Compute what merging `updates`, by module name, needs. Takes long, on any thread; changes nothing.

    Raises:
        MergeRefusedError: a module is no projection of the base, or its merged weight is not finite.
    """
    known = {name for group in base.groups for name in group.names}
    if unknown := sorted(set(updates) - known):
        raise MergeRefusedError(
            f"{ref} changes {unknown[0]}, which is no linear layer: its output cannot be freed from that for "
            "other requests. Serve the adapter batched, or merge it offline with `hotswap merge`",
            adapter=str(ref),
        )
    touched = [group for group in base.groups if any(name in updates for name in group.names)]
    with torch.inference_mode():
        swaps = tuple(_swap(ref, group, updates, base) for group in touched)
        if base.device.type == "cuda":  # what was begun here must be there when another stream reads it
            torch.cuda.current_stream(base.device).synchronize()
    return PreparedMerge(ref, swaps)


def _swap(
    ref: AdapterRef, group: ProjectionGroup, updates: Mapping[str, LowRankUpdate], base: BaseModel
) -> _Swap:
    own = [
        (start, updates[name])
        for name, start in zip(group.names, group.offsets, strict=True)
        if name in updates
    ]
    bias = group.bias
    if any(update.shift is not None for _, update in own):
        bias = torch.zeros(sum(group.widths), dtype=base.dtype, device=base.device)
        if group.bias is not None:
            bias += group.bias
        for start, update in own:
            if update.shift is not None:
                bias[start : start + len(update.shift)] += update.shift.to(bias)
    weights = [(start, update) for start, update in own if update.rank]
    projection = base.state.kernels.merged(group.base_projection, weights, bias)
    # Random inputs tell how weights act, whatever form they are in.
    probe = torch.randn(_NUM_PROBES, group.in_features, generator=torch.Generator().manual_seed(0))
    probe = probe.to(base.device, base.dtype)
    exact, out = group.base_projection(probe), projection(probe)
    if not out.isfinite().all():
        raise MergeRefusedError(
            f"{ref}: the merged weight of {', '.join(group.names)} is not finite", adapter=str(ref)
        )
    at_logits = group is base.head
    subtracted = _Subtracted(group, updates, bias, base, at_logits)
    subtracted.apply(probe, out, token_slots(np.zeros(_NUM_PROBES, np.int32), base.device))
    accurate = all(
        _error(out[:, start : start + width], exact[:, start : start + width]) <= _TOLERANCE[base.dtype]
        for start, width in zip(group.offsets, group.widths, strict=True)
    )
    return _Swap(group, projection, subtracted if accurate else _Recomputed(group, base.state, at_logits))


def _error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.float() - exact.float()).norm() / exact.float().norm().clamp(min=1e-30))


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
        base: BaseModel,
        at_logits: bool,
    ) -> None:
        self._state = base.state
        self._at_logits = at_logits
        own = [updates.get(name) for name in group.names]
        rank = max(1, *(0 if update is None else update.rank for update in own))
        a = torch.zeros(1, len(own), rank, group.in_features, dtype=base.dtype, device=base.device)
        b = tuple(torch.zeros(1, rank, width, dtype=base.dtype, device=base.device) for width in group.widths)
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
        self._bank = GroupedLora(a, b, ranks.to(base.device), group.widths, group.offsets)
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
            self._tables = factors.to(base.device), summands.to(base.device)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        slots = self._state.slots_of(OTHERS, _OTHERS_SLOTS, at_logits=self._at_logits)
        if slots is not None:
            self.apply(x, out, slots)

    def apply(self, x: torch.Tensor, out: torch.Tensor, slots: TokenSlots) -> None:
        """The same for rows that `slots` tells."""
        if self._tables is not None:
            factors, summands = map(slots.rows_of, self._tables)
            out.copy_(torch.addcmul(summands, out.float(), factors))
        self._state.kernels.lora(x, self._bank, slots, out)


class MergedWeights:
    """Which adapter is in a base's weights. All but `ref` is for the engine's thread, between two steps."""

    def __init__(self) -> None:
        self._merge: PreparedMerge | None = None
        self._in_use = False
        self.serial = 0
        """Counts the merges, so that what was recorded of an earlier one can be told."""

    @property
    def ref(self) -> AdapterRef | None:
        return None if self._merge is None else self._merge.ref

    def install(self, merge: PreparedMerge | None) -> PreparedMerge | None:
        """Let `merge` be the one that `use` means, or none; returns the one before."""
        self.use(False)
        before, self._merge = self._merge, merge
        self.serial += 1
        return before

    def use(self, wanted: bool) -> None:
        """Run the coming steps over the merged weights, or over the base's own."""
        if self._merge is None or wanted is self._in_use:
            return
        for swap in self._merge.swaps:
            swap.group.run(swap.projection if wanted else None, swap.correction if wanted else None)
        self._in_use = wanted
