"""No adapter computes with infinity, which scaling and narrower types can make of finite weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hotswap_server.errors import AdapterInvalidError


def check_finite(adapter: object) -> None:
    """Look at every tensor that a parsed adapter of any method holds.

    Raises:
        AdapterInvalidError: one holds NaN or infinity; the message names it.
    """
    for name, tensor in _tensors("", adapter):
        # A sum is finite only if every term is, and is many times faster than looking at each of them.
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise AdapterInvalidError(
                f"{name}: scaled, and as the {dtype} that the base computes in, it holds infinity or NaN; "
                "its weights or its scale are too large"
            )


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(f"{name} {key}".strip(), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(name, inner)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(f"{name} {field.name}".strip(), getattr(value, field.name))
