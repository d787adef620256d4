"""What the compiler need not look into: projections, attention and blocks as operations of their own.

A compiled decoder layer then is the same code for every layer, whatever adapters do: they are met when the
operation runs, which is while a graph is captured, or in every step without one.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch

_numbers = itertools.count()
_targets: WeakValueDictionary[int, Any] = WeakValueDictionary()


class HiddenProjection(Protocol):
    """See `ProjectionGroup.compute`."""

    def compute(self, x: torch.Tensor) -> torch.Tensor: ...


def hide(target: object) -> torch.Tensor:
    """A handle of `target`: a tensor, since of a number the compiler would make a constant."""
    number = next(_numbers)
    _targets[number] = target
    return torch.tensor(number)


@torch.library.custom_op("hotswap::project", mutates_args=())
def project(x: torch.Tensor, handle: torch.Tensor, width: int) -> torch.Tensor:
    """x [..., in_features] -> [..., width] of a `ProjectionGroup`."""
    target: HiddenProjection = _targets[int(handle)]
    return target.compute(x)


@project.register_fake
def _(x: torch.Tensor, handle: torch.Tensor, width: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], width)


@torch.library.custom_op("hotswap::attend", mutates_args=())
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    handle: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """[1, heads, tokens, head_dim] -> [1, tokens, heads, head_dim] through the cache of one layer."""
    result: torch.Tensor = _targets[int(handle)].attend(query, key, value, scale, window, softcap)
    return result


@attend.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    handle: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])


@torch.library.custom_op("hotswap::adapt_block", mutates_args={"x"})
def adapt_block(x: torch.Tensor, stream: torch.Tensor, handle: torch.Tensor) -> None:
    """Make of a `Block`'s output `x`, in place, what its adapters do; both [..., hidden_size]."""
    _targets[int(handle)].adapt(x, stream)


@adapt_block.register_fake
def _(x: torch.Tensor, stream: torch.Tensor, handle: torch.Tensor) -> None:
    pass
