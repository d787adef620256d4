"""The base's linear layers, grouped by shared input: one matrix product and one adapter pass per group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from hotswap_server.engine.blocks import Block
from hotswap_server.engine.hidden import hide, project
from hotswap_server.engine.quantization import QuantizedLinear
from hotswap_server.kernels import Kernels, Projection

Linear = nn.Linear | QuantizedLinear


class ProjectionDelta(Protocol):
    """What a method adds to a group's output, in place: x [tokens, in_features], out [tokens, widths]."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None: ...


class FusedDelta(ProjectionDelta, Protocol):
    """A delta that a product may have inside."""

    def project(self, projection: Projection, x: torch.Tensor) -> torch.Tensor | None:
        """`projection` of `x` with this delta in it; None if the two go one after another."""
        ...


class InputTransform(Protocol):
    """What a method makes of a group's input: x [tokens, in_features] stays as it is, the result is new."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class StackedProjection:
    """Projections of one input side by side, each with its own weights: `members` in the output's order."""

    def __init__(self, members: Sequence[Projection]) -> None:
        self.members = tuple(members)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.members) == 1:
            return self.members[0](x)
        return torch.cat([member(x) for member in self.members], dim=-1)

    def weight(self) -> torch.Tensor:
        return torch.cat([member.weight() for member in self.members])


class ProjectionGroup:
    """Projections that read the same tensor, such as q, k and v.

    Their weights are stacked into one; quantised ones stay apart, in a `StackedProjection`, where the kernels
    have no product for all. `added_bytes` is what the projection holds beyond the weights it was made of.
    `block` is the one whose output is this group's, untouched, if there is one.
    """

    def __init__(
        self,
        names: Sequence[str],
        widths: Sequence[int],
        in_features: int,
        projection: Projection,
        bias: torch.Tensor | None,
        added_bytes: int = 0,
    ) -> None:
        self.names = tuple(names)
        self.widths = tuple(widths)
        self.offsets = tuple(sum(widths[:index]) for index in range(len(widths)))
        self.width = sum(widths)
        self.in_features = in_features
        self.handle: torch.Tensor | None = None  # where the compiler is not to look inside
        self.base_projection = projection
        self.projection = projection  # what runs: another one while an adapter is merged
        self.bias = bias
        self.added_bytes = added_bytes
        self.block: Block | None = None
        self.correction: ProjectionDelta | None = None
        self.inputs: list[InputTransform] = []
        self.deltas: list[ProjectionDelta] = []
        self.fused: FusedDelta | None = None  # the one of `deltas` that may be
        self._given: torch.Tensor | None = None
        self._out: torch.Tensor | None = None

    @classmethod
    def build(cls, members: Sequence[tuple[str, Linear]], kernels: Kernels) -> ProjectionGroup:
        linears = [linear for _, linear in members]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        bias = None
        if biases:
            bias = torch.cat(
                [
                    biases[0].new_zeros(linear.out_features) if linear.bias is None else linear.bias
                    for linear in linears
                ]
            )
        projection: Projection
        added_bytes = 0
        quantized = [linear.projection for linear in linears if isinstance(linear, QuantizedLinear)]
        fused = kernels.four_bit(quantized, bias) if len(quantized) == len(linears) else None
        if fused is not None:
            projection = fused
            added_bytes = fused.nbytes - sum(member.nbytes for member in quantized)
        elif quantized:
            projection = StackedProjection([_projection(linear, kernels) for linear in linears])
        else:
            projection = kernels.projection(torch.cat([linear.weight for linear in linears]), bias)
        widths = [linear.out_features for linear in linears]
        names = [name for name, _ in members]
        return cls(names, widths, linears[0].in_features, projection, bias, added_bytes)

    def weight_of(self, name: str) -> torch.Tensor:
        """A member's weight [out_features, in_features], bit for bit the base's, dequantised if need be."""
        member = self.names.index(name)
        base = self.base_projection
        if isinstance(base, StackedProjection):
            return base.members[member].weight()
        return base.weight()[self.offsets[member] : self.offsets[member] + self.widths[member]]

    def run(self, projection: Projection | None, correction: ProjectionDelta | None) -> None:
        """Use `projection`, and on its output first of all `correction`; None is the base's own."""
        self.projection = self.base_projection if projection is None else projection
        self.correction = correction

    def detach(self) -> None:
        """Forget every adapter method."""
        self.run(None, None)
        self.inputs.clear()
        self.deltas.clear()
        self.fused = None

    def project(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """The output of one member. The first to see a tensor computes all; the last forgets it."""
        if x is not self._given or self._out is None:
            self._given = x
            self._out = self.compute(x) if self.handle is None else project(x, self.handle, self.width)
        out = self._out
        if member == len(self.widths) - 1:
            self._given = self._out = None
        if len(self.widths) == 1:
            return out
        start = self.offsets[member]
        return out[..., start : start + self.widths[member]]

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., width], adapters included."""
        rows = x.reshape(-1, self.in_features)
        for transform in self.inputs:
            rows = transform(rows)
        out = None
        if self.fused is not None and self.correction is None:
            out = self.fused.project(self.projection, rows)
        inside = None if out is None else self.fused
        if out is None:
            out = self.projection(rows)
        if self.correction is not None:
            self.correction(rows, out)
        for delta in self.deltas:
            if delta is not inside:
                delta(rows, out)
        return out.view(*x.shape[:-1], self.width)

    def hide(self) -> None:
        """Keep the compiler out of `compute`."""
        self.handle = hide(self)


class GroupedProjection(nn.Module):
    """Stands where an `nn.Linear` of the base stood."""

    def __init__(self, group: ProjectionGroup, member: int) -> None:
        super().__init__()
        self.group = group
        self.member = member
        self.in_features = group.in_features
        self.out_features = group.widths[member]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.project(x, self.member)


def _projection(linear: Linear, kernels: Kernels) -> Projection:
    if isinstance(linear, QuantizedLinear):
        return linear.projection
    return kernels.projection(linear.weight, linear.bias)
