"""Copies of the base's embeddings, which PEFT saves beside an adapter of them unless told otherwise."""

from __future__ import annotations

import torch

from hotswap_server.adapters.fields import MODULE_PREFIX
from hotswap_server.engine.base import BaseModel
from hotswap_server.errors import AdapterInvalidError

_SUFFIXES = (".base_layer.weight", ".weight")


def is_copy(name: str, tensor: torch.Tensor, base: BaseModel) -> bool:
    """Whether the tensor of that name is the token embedding's or the output embedding's own weight.

    Raises:
        AdapterInvalidError: it is one of these by its name, but not the base's bit for bit.
    """
    local = name.removeprefix(MODULE_PREFIX)
    module = next((local.removesuffix(end) for end in _SUFFIXES if local.endswith(end)), None)
    if module is None or local == name:
        return False
    if base.embedding is not None and module == base.embedding.name:
        weight = base.embedding.weight
    elif base.head is not None and module in base.head.names:
        weight = base.head.weight_of(module)
    else:
        return False
    if not torch.equal(tensor.to(base.dtype), weight.cpu()):
        raise AdapterInvalidError(
            f"tensor {name}: is another weight than the base's, so the embeddings were trained in full or "
            "resized, or the adapter is of another base or precision; adapt them with LoRA, and save with "
            "save_embedding_layers=False"
        )
    return True
