"""A LoRA checkpoint, from PEFT's fields and tensors to an adapter that fits the base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain

import torch

from hotswap_server.adapters.checkpoint import RawCheckpoint
from hotswap_server.adapters.fields import check_fields, check_targets
from hotswap_server.adapters.method import BankOptions, shown_fields
from hotswap_server.adapters.methods.lora.adapter import NAME, LoraAdapter
from hotswap_server.adapters.methods.lora.bank import LoraBank, bank_bytes
from hotswap_server.adapters.methods.lora.biases import bias_shifts
from hotswap_server.adapters.methods.lora.tensors import (
    EMBEDDING_A,
    EMBEDDING_B,
    MAGNITUDE,
    A,
    B,
    LoraTensors,
    sort_tensors,
)
from hotswap_server.adapters.targets import by_pattern, target_modules
from hotswap_server.adapters.transfer import packed
from hotswap_server.engine.base import BaseModel
from hotswap_server.errors import AdapterInvalidError
from hotswap_server.kernels import LowRankUpdate

# Fields of LoraConfig that this file reads.
_READ = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("use_dora", "lora_bias", "ensure_weight_tying"),
    }
)
# Fields of its own that leave a trained adapter's result alone.
_WITHOUT_EFFECT = frozenset(
    {
        *("lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)
_SHOWN = (
    *("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern"),
    *("alpha_pattern", "layers_to_transform", "exclude_modules", "lora_bias", "ensure_weight_tying"),
)
# Initialisations that leave the base weights alone. Others (PiSSA, OLoRA, CorDA, LoRA-GA) change them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
_NORM_ROWS = 2048  # at a time: in float32, an output embedding may be larger than the base in 4 bits


class LoraMethod:
    """Reads PEFT's LORA checkpoints."""

    name = NAME
    peft_type = "LORA"

    def create_bank(self, base: BaseModel, options: BankOptions) -> LoraBank:
        return LoraBank(base, options)

    def bank_bytes(self, base: BaseModel, options: BankOptions) -> int:
        return bank_bytes(base, options)

    def updates(self, adapter: LoraAdapter) -> dict[str, LowRankUpdate]:
        """See `MergeableMethod`."""
        nothing = (torch.empty(0, 0), torch.empty(0, 0))
        return {
            module: LowRankUpdate(
                *adapter.weights.get(module, nothing), adapter.scales.get(module), adapter.shifts.get(module)
            )
            for module in dict.fromkeys([*adapter.weights, *adapter.shifts])
        }

    def parse(self, checkpoint: RawCheckpoint, base: BaseModel, options: BankOptions) -> LoraAdapter:
        config = checkpoint.config
        _check_fields(config)
        tensors = sort_tensors(checkpoint.tensors, base)
        shapes = _shapes(base)
        _check_modules(config, tensors, shapes, base)
        scalings, weights = {}, {}
        for module, (a, b) in (tensors.pairs | tensors.embedding_pairs).items():
            names = (A, B) if module in tensors.pairs else (EMBEDDING_A, EMBEDDING_B)
            _check_shapes(module, names, a, b, shapes[module])
            scalings[module] = _scaling(config, module, names[0], a.shape[0], options)
            scaled = (b.float() * scalings[module]).t()
            weights[module] = (a.to(base.dtype), scaled.to(base.dtype).contiguous())
        scales = {}
        if config.get("use_dora"):
            scales = {m: _output_scale(m, t, weights[m], base) for m, t in tensors.magnitudes.items()}
        shifts = {m: s.to(base.dtype) for m, s in bias_shifts(config, tensors, scalings, base).items()}
        if base.embedding is not None and base.embedding.name in weights:
            a, b = weights[base.embedding.name]
            weights[base.embedding.name] = (a, (b.float() * base.embedding.scale).to(base.dtype))
        if base.device.type == "cuda":
            halves = iter(packed([*chain(*weights.values())]))
            weights = dict(zip(weights, zip(halves, halves, strict=True), strict=True))
        held = [*chain(*weights.values()), *scales.values(), *shifts.values()]
        return LoraAdapter(
            weights=weights,
            scales=scales,
            shifts=shifts,
            nbytes=sum(tensor.nbytes for tensor in held),
            num_parameters=sum(tensor.numel() for tensor in held),
            details=shown_fields(config, (*_SHOWN, "bias") if shifts else _SHOWN),
        )


def _check_fields(config: Mapping[str, object]) -> None:
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise AdapterInvalidError(
            f"adapter_config.json: init_lora_weights {init!r} changes the base weights; save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
        )
    if saved := config.get("modules_to_save"):
        raise AdapterInvalidError(
            f"adapter_config.json: modules_to_save {saved!r} is not served, whole modules for each adapter; "
            "name them in target_modules instead, which may hold lm_head and embed_tokens"
        )
    check_fields(config, read=_READ, without_effect=_WITHOUT_EFFECT)


def _shapes(base: BaseModel) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every module that a LoRA may adapt."""
    shapes = base.linear_shapes | base.head_shape
    if base.embedding is not None:
        shapes[base.embedding.name] = (base.embedding.width, base.embedding.weight.shape[0])
    return shapes


def _check_modules(
    config: Mapping[str, object],
    tensors: LoraTensors,
    shapes: Mapping[str, tuple[int, int]],
    base: BaseModel,
) -> None:
    """There must be tensors for what the fields select, and for nothing else."""
    expected = target_modules(config, shapes, linears=base.linear_shapes)
    embeddings = {base.embedding.name} if base.embedding is not None else set()
    if config.get("ensure_weight_tying") and base.tied_head and base.head is not None:
        tied = embeddings | {base.head.names[0]}
        expected |= tied if expected & tied else set()
    check_targets(expected - embeddings, set(tensors.pairs), A)
    check_targets(expected & embeddings, set(tensors.embedding_pairs), EMBEDDING_A)
    magnitudes = set(tensors.magnitudes)
    if not config.get("use_dora") and magnitudes:
        raise AdapterInvalidError(
            f"tensor {min(magnitudes)}{MAGNITUDE}: is of a DoRA, but adapter_config.json has no use_dora"
        )
    check_targets(expected if config.get("use_dora") else set(), magnitudes, MAGNITUDE)


def _check_shapes(
    module: str, names: tuple[str, str], a: torch.Tensor, b: torch.Tensor, shape: tuple[int, int]
) -> None:
    out_features, in_features = shape
    if a.ndim != 2 or a.shape[1] != in_features or a.shape[0] < 1:
        raise AdapterInvalidError(
            f"{module}{names[0]}: is {list(a.shape)}, the base needs [rank, {in_features}]"
        )
    if tuple(b.shape) != (out_features, a.shape[0]):
        raise AdapterInvalidError(
            f"{module}{names[1]}: is {list(b.shape)}, the base and {names[0]} need "
            f"[{out_features}, {a.shape[0]}]"
        )


def _scaling(
    config: Mapping[str, object], module: str, tensor: str, rank_of_tensor: int, options: BankOptions
) -> float:
    rank = _pattern_value(config, "rank_pattern", module, _number(config, "r"))
    alpha = _pattern_value(config, "alpha_pattern", module, _number(config, "lora_alpha"))
    if rank_of_tensor != rank:
        raise AdapterInvalidError(
            f"{module}{tensor}: has rank {rank_of_tensor}, but adapter_config.json (r, rank_pattern) says "
            f"{rank:g}"
        )
    if rank > options.max_lora_rank:
        raise AdapterInvalidError(
            f"{module}: rank {rank:g} is over this server's limit of {options.max_lora_rank}; "
            "start it with a larger max_lora_rank"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _output_scale(
    module: str, magnitude: torch.Tensor, update: tuple[torch.Tensor, torch.Tensor], base: BaseModel
) -> torch.Tensor:
    """DoRA's factors, magnitude / ||W + B A||, a norm for each output."""
    a, b = update
    out_features = b.shape[1]
    if tuple(magnitude.shape) != (out_features,):
        raise AdapterInvalidError(
            f"{module}{MAGNITUDE}: is {list(magnitude.shape)}, the base needs [{out_features}]"
        )
    if base.embedding is not None and module == base.embedding.name:
        weight = base.embedding.weight.t()
    else:
        weight = next(group for group in base.groups if module in group.names).weight_of(module)
    norms = []
    for start in range(0, out_features, _NORM_ROWS):
        rows = slice(start, start + _NORM_ROWS)
        norms.append((weight[rows].float().cpu() + b[:, rows].float().t() @ a.float()).norm(dim=1))
    return (magnitude.float() / torch.cat(norms)).to(base.dtype)


def _number(config: Mapping[str, object], name: str) -> float:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise AdapterInvalidError(f"adapter_config.json: {name} must be a number over 0, got {value!r}")
    return value


def _pattern_value(config: Mapping[str, object], name: str, module: str, default: float) -> float:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise AdapterInvalidError(f"adapter_config.json: {name} must be an object of pattern to number")
    value = by_pattern(name, patterns, module, default)
    return _number({name: value}, name)
