"""The tensors of a LoRA checkpoint, told apart by their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from hotswap_server.adapters.copies import is_copy
from hotswap_server.adapters.fields import MODULE_PREFIX
from hotswap_server.engine.base import BaseModel
from hotswap_server.errors import AdapterInvalidError

A, B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
MAGNITUDE = ".lora_magnitude_vector"
LORA_BIAS = ".lora_B.bias"
ADAPTED_BIAS, BIAS = ".base_layer.bias", ".bias"

_PARTNERS = {A: B, B: A, EMBEDDING_A: EMBEDDING_B, EMBEDDING_B: EMBEDDING_A}

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """By module, but `biases`, which are by module and suffix, such as `lm_head.bias`."""

    pairs: Pairs = field(default_factory=dict)
    embedding_pairs: Pairs = field(default_factory=dict)
    magnitudes: dict[str, torch.Tensor] = field(default_factory=dict)
    lora_biases: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def adapted(self) -> set[str]:
        """The modules with a low-rank update."""
        return set(self.pairs) | set(self.embedding_pairs)


def sort_tensors(tensors: Mapping[str, torch.Tensor], base: BaseModel) -> LoraTensors:
    """All of `tensors`, without copies of the base's own embeddings, which PEFT adds when they are adapted.

    Raises:
        AdapterInvalidError: one is no part of a LoRA, lacks its partner, or is another embedding's copy.
    """
    found = LoraTensors()
    halves: dict[tuple[str, str], torch.Tensor] = {}
    for name, tensor in tensors.items():
        if "modules_to_save" in name:
            raise AdapterInvalidError(f"tensor {name}: modules_to_save is not served")
        if not name.startswith(MODULE_PREFIX):
            raise _useless(name)
        local = name.removeprefix(MODULE_PREFIX)
        for suffix in _PARTNERS:
            if local.endswith(suffix):
                halves[local.removesuffix(suffix), suffix] = tensor
                break
        else:
            if local.endswith(MAGNITUDE):
                found.magnitudes[local.removesuffix(MAGNITUDE)] = tensor
            elif local.endswith(LORA_BIAS):
                found.lora_biases[local.removesuffix(LORA_BIAS)] = tensor
            elif local.endswith(BIAS):
                found.biases[local] = tensor
            elif not is_copy(name, tensor, base):
                raise _useless(name)
    for (module, suffix), tensor in halves.items():
        partner = halves.get((module, _PARTNERS[suffix]))
        if partner is None:
            raise AdapterInvalidError(f"tensor {module}{suffix}: its partner {_PARTNERS[suffix]} is missing")
        if suffix == A:
            found.pairs[module] = (tensor, partner)
        elif suffix == EMBEDDING_A:
            found.embedding_pairs[module] = (tensor, partner)
    return found


def _useless(name: str) -> AdapterInvalidError:
    return AdapterInvalidError(f"tensor {name}: is no part of a LoRA, and nothing would use it")
