"""A LoRA merged into its base for good: a plain transformers checkpoint, which knows nothing of adapters."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hotswap_server.adapters.checkpoint import RawCheckpoint
from hotswap_server.adapters.method import BankOptions, MergeableMethod, available_methods
from hotswap_server.engine.base import prepare_base
from hotswap_server.errors import BaseModelError, MergeRefusedError
from hotswap_server.kernels import LowRankUpdate, select_kernels
from hotswap_server.kernels.reference import merged_weight

_ANY_RANK = 2**31


def write_merged_base(base: Path, checkpoint: RawCheckpoint, output: Path) -> None:
    """Write the base in directory `base` with the adapter merged, and its tokenizer, to `output`.

    Weights are computed in float32 and written in the base's type. `output` appears complete or not at all.
    Where embeddings are tied and the adapter changes one of them, they are written apart.

    Raises:
        FileExistsError: `output` is there already.
        BaseModelError: the base cannot be loaded, or is quantised.
        AdapterInvalidError: the adapter does not fit the base.
        MergeRefusedError: it is no change of weights, or of ones that the base does not have.
    """
    from transformers import AutoTokenizer

    if output.exists():
        raise FileExistsError(f"{output} exists already")
    method = available_methods()[checkpoint.ref.method]
    if not isinstance(method, MergeableMethod):
        raise MergeRefusedError(
            f"{checkpoint.ref.name} is a {checkpoint.ref.method} adapter; only LoRA is a change of weights"
        )
    prepared = prepare_base(
        _load(base), kernels=select_kernels(torch.device("cpu"), torch.float32, "reference")
    )
    with torch.inference_mode():
        # In float32 whatever the base's type: rounding is for the result alone.
        view = dataclasses.replace(prepared, dtype=torch.float32)
        options = BankOptions(max_lora_rank=_ANY_RANK)
        updates = method.updates(method.parse(checkpoint, view, options))
    scale = 1.0 if prepared.embedding is None else prepared.embedding.scale
    del prepared, view
    model = _load(base)
    with torch.inference_mode():
        _merge_into(model, updates, embedding_scale=scale)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(scratch)
        _sync(scratch)
        scratch.chmod(0o777 & ~_umask())
        scratch.rename(output)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError(f"base: transformers cannot load a causal LM from it: {error}") from error
    if getattr(model.config, "quantization_config", None) is not None:
        raise BaseModelError(
            "base: it is quantised, and what is merged into it would be rounded away; give the base in full "
            "precision"
        )
    return model


def _merge_into(model: Any, updates: Mapping[str, LowRankUpdate], *, embedding_scale: float) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    names = {module: name for name, module in model.named_modules()}
    if tied and not updates.keys().isdisjoint({names[head], names[embedding]}):
        head.weight = nn.Parameter(embedding.weight.clone(), requires_grad=False)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    for name, update in updates.items():
        module = model.get_submodule(name)
        if module is embedding:
            # Its output is a column of the weight that the update is of, times the model's own factor.
            unscaled = dataclasses.replace(update, b=update.b / embedding_scale)
            weight = merged_weight(module.weight.t(), unscaled).t().contiguous()
        else:
            weight = merged_weight(module.weight, update) if update.rank else module.weight
        if not weight.sum(dtype=torch.float32).isfinite():
            raise MergeRefusedError(f"the merged weight of {name} is not finite")
        module.weight = nn.Parameter(weight, requires_grad=False)
        if update.shift is not None:
            if module.bias is None:
                raise MergeRefusedError(
                    f"the adapter brings a bias for {name}, and the base has none there to add it to; serve "
                    "it batched"
                )
            bias = (module.bias.float() + update.shift.float()).to(module.bias.dtype)
            module.bias = nn.Parameter(bias, requires_grad=False)


def _sync(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
