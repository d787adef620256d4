"""What is in host memory of a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

NAME = "lora"


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """`weights` by module: A [rank, in_features] and B [rank, out_features], the latter already scaled.

    Of the token embedding, in_features is the vocabulary. `scales`, of a DoRA, by module: the factor of each
    output [out_features], the base's share included. `shifts` by module: what is added to its output
    [out_features] in the end, since the adapter has another bias than the base.
    """

    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scales: Mapping[str, torch.Tensor]
    shifts: Mapping[str, torch.Tensor]
    nbytes: int
    num_parameters: int
    details: Mapping[str, str]
    method: str = field(default=NAME, init=False)
