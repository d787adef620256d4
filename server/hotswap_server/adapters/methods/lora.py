"""LoRA (Hu et al., 2021): W x + scaling * B A x, with rsLoRA's scaling (Kalajdzievski, 2023), and DoRA.

DoRA (Liu et al., 2024) scales each output by magnitude / ||W + scaling * B A||, a norm taken once at load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain

import torch

from hotswap_server.adapters.checkpoint import RawCheckpoint
from hotswap_server.adapters.fields import MODULE_PREFIX, check_fields, check_targets
from hotswap_server.adapters.method import BankOptions, shown_fields
from hotswap_server.adapters.scales import ScaleTable
from hotswap_server.adapters.targets import by_pattern, target_modules
from hotswap_server.engine.attention import StepState
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.merging import LowRankUpdate
from hotswap_server.engine.projection import ProjectionGroup
from hotswap_server.errors import AdapterInvalidError
from hotswap_server.kernels import GroupedLora

_A, _B = ".lora_A.weight", ".lora_B.weight"
_MAGNITUDE = ".lora_magnitude_vector"

# Fields of LoraConfig that this file reads.
_READ = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        "use_dora",
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
    *("alpha_pattern", "layers_to_transform", "exclude_modules"),
)
# Initialisations that leave the base weights alone. Others (PiSSA, OLoRA, CorDA, LoRA-GA) change them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")

_MODULE_TENSORS = {
    "lora_embedding_A": "LoRA on an embedding",
    "lora_embedding_B": "LoRA on an embedding",
    "lora_B.bias": "lora_bias",
    "modules_to_save": "modules_to_save",
}


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """`weights` by module: A [rank, in_features] and B [rank, out_features], the latter already scaled.

    `scales`, of a DoRA, by module: the factor of each output [out_features], the base's share included.
    """

    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scales: Mapping[str, torch.Tensor]
    nbytes: int
    num_parameters: int
    details: Mapping[str, str]
    method: str = field(default="lora", init=False)


class LoraBank:
    """Banks for all groups of projections. A group's tensors are made when an adapter first touches it."""

    def __init__(self, base: BaseModel, options: BankOptions) -> None:
        self.num_slots = options.num_slots
        self._base = base
        self._max_rank = options.max_lora_rank
        self._banks: dict[ProjectionGroup, GroupedLora] = {}
        self._deltas: dict[ProjectionGroup, _LoraDelta] = {}

    def put(self, slot: int, adapter: LoraAdapter) -> None:
        for group in self._base.projections:
            touched = any(name in adapter.weights for name in group.names)
            if group not in self._banks and not touched:
                continue
            bank = self._banks.get(group) or self._allocate(group)
            for member, name in enumerate(group.names):
                weights = adapter.weights.get(name)
                if weights is None:
                    bank.ranks[slot, member] = 0
                    continue
                a, b = weights
                rank = a.shape[0]
                bank.a[slot, member, :rank].copy_(a)
                bank.b[member][slot, :rank].copy_(b)
                bank.ranks[slot, member] = rank
            self._put_scales(slot, group, adapter)

    def _put_scales(self, slot: int, group: ProjectionGroup, adapter: LoraAdapter) -> None:
        delta = self._deltas[group]
        if delta.scales is None:
            if not any(name in adapter.scales for name in group.names):
                return
            delta.scales = ScaleTable(self._base, self.num_slots, sum(group.widths))
        delta.scales.reset(slot)
        for name, offset in zip(group.names, group.offsets, strict=True):
            if (scale := adapter.scales.get(name)) is not None:
                delta.scales.put(slot, offset, scale)

    def _allocate(self, group: ProjectionGroup) -> GroupedLora:
        slots, members, rank = self.num_slots, len(group.names), self._max_rank

        def empty(*shape: int) -> torch.Tensor:
            # Rows beyond a rank are never read, so on a CPU they never take memory either.
            return torch.empty(*shape, dtype=self._base.dtype, device=self._base.device)

        bank = GroupedLora(
            a=empty(slots, members, rank, group.in_features),
            b=tuple(empty(slots, rank, width) for width in group.widths),
            ranks=torch.zeros(slots, members, dtype=torch.int32, device=self._base.device),
            widths=group.widths,
            offsets=group.offsets,
        )
        self._banks[group] = bank
        self._deltas[group] = _LoraDelta(self._base.state, bank, group.bias)
        group.deltas.append(self._deltas[group])
        return bank


class _LoraDelta:
    def __init__(self, state: StepState, bank: GroupedLora, bias: torch.Tensor | None) -> None:
        self._state = state
        self._bank = bank
        self._bias = bias
        self.scales: ScaleTable | None = None

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        slots = self._state.slots.get(METHOD.name)
        if slots is not None:
            self._state.kernels.lora(x, self._bank, slots, out)
            if self.scales is not None:
                rows = self.scales.rows(slots)
                out.mul_(rows)
                if self._bias is not None:  # which is not scaled
                    out.sub_((rows - 1.0) * self._bias)


class LoraMethod:
    """Reads PEFT's LORA checkpoints."""

    name = "lora"
    peft_type = "LORA"

    def create_bank(self, base: BaseModel, options: BankOptions) -> LoraBank:
        return LoraBank(base, options)

    def updates(self, adapter: LoraAdapter) -> dict[str, LowRankUpdate]:
        """See `MergeableMethod`."""
        return {
            module: LowRankUpdate(a, b, adapter.scales.get(module))
            for module, (a, b) in adapter.weights.items()
        }

    def parse(self, checkpoint: RawCheckpoint, base: BaseModel, options: BankOptions) -> LoraAdapter:
        config = checkpoint.config
        _check_fields(config)
        magnitudes = _magnitudes(checkpoint)
        pairs = _pair_tensors({n: t for n, t in checkpoint.tensors.items() if not n.endswith(_MAGNITUDE)})
        expected = target_modules(config, base.linear_shapes)
        check_targets(expected, set(pairs), _A)
        weights = {}
        for module, (a, b) in pairs.items():
            _check_shapes(module, a, b, base.linear_shapes[module])
            rank = _pattern_value(config, "rank_pattern", module, _number(config, "r"))
            alpha = _pattern_value(config, "alpha_pattern", module, _number(config, "lora_alpha"))
            if a.shape[0] != rank:
                raise AdapterInvalidError(
                    f"{module}{_A}: has rank {a.shape[0]}, but adapter_config.json (r, rank_pattern) says "
                    f"{rank:g}"
                )
            if rank > options.max_lora_rank:
                raise AdapterInvalidError(
                    f"{module}: rank {rank:g} is over this server's limit of {options.max_lora_rank}; "
                    "start it with a larger max_lora_rank"
                )
            scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            weights[module] = (a.to(base.dtype), (b.float() * scaling).t().to(base.dtype).contiguous())
        scales = _output_scales(magnitudes, weights, base) if config.get("use_dora") else {}
        return LoraAdapter(
            weights=weights,
            scales=scales,
            nbytes=sum(t.nbytes for t in (*chain(*weights.values()), *scales.values())),
            num_parameters=sum(t.numel() for t in (*chain(*weights.values()), *scales.values())),
            details=shown_fields(config, _SHOWN),
        )


def _check_fields(config: Mapping[str, object]) -> None:
    bias = config.get("bias", "none")
    if bias != "none":
        raise AdapterInvalidError(f"adapter_config.json: bias {bias!r} is not served; train with bias 'none'")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise AdapterInvalidError(
            f"adapter_config.json: init_lora_weights {init!r} changes the base weights; save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
        )
    check_fields(config, read=_READ, without_effect=_WITHOUT_EFFECT)


def _pair_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        for marker, meaning in _MODULE_TENSORS.items():
            if marker in name:
                raise AdapterInvalidError(f"tensor {name}: {meaning} is not served")
        suffix = next((end for end in (_A, _B) if name.endswith(end)), None)
        if suffix is None or not name.startswith(MODULE_PREFIX):
            raise AdapterInvalidError(f"tensor {name}: is no part of a LoRA, and nothing would use it")
        halves.setdefault(name[len(MODULE_PREFIX) : -len(suffix)], {})[suffix] = tensor
    for module, pair in halves.items():
        if len(pair) != 2:
            present = next(iter(pair))
            raise AdapterInvalidError(
                f"tensor {module}{present}: its partner {_B if present == _A else _A} is missing"
            )
    return {module: (pair[_A], pair[_B]) for module, pair in halves.items()}


def _magnitudes(checkpoint: RawCheckpoint) -> dict[str, torch.Tensor]:
    """DoRA's magnitudes by module; there are some just when the configuration says so."""
    found = {
        name.removeprefix(MODULE_PREFIX).removesuffix(_MAGNITUDE): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(_MAGNITUDE)
    }
    if found and not checkpoint.config.get("use_dora"):
        raise AdapterInvalidError(
            f"tensor {next(iter(found))}{_MAGNITUDE}: is of a DoRA, but adapter_config.json has no use_dora"
        )
    return found


def _output_scales(
    magnitudes: Mapping[str, torch.Tensor],
    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    base: BaseModel,
) -> dict[str, torch.Tensor]:
    check_targets(set(weights), set(magnitudes), _MAGNITUDE)
    groups = {name: group for group in base.projections for name in group.names}
    scales = {}
    for module, magnitude in magnitudes.items():
        out_features = base.linear_shapes[module][0]
        if tuple(magnitude.shape) != (out_features,):
            raise AdapterInvalidError(
                f"{module}{_MAGNITUDE}: is {list(magnitude.shape)}, the base needs [{out_features}]"
            )
        a, b = weights[module]
        adapted = groups[module].weight_of(module).float().cpu() + (b.float().t() @ a.float())
        scales[module] = (magnitude.float() / adapted.norm(dim=1)).to(base.dtype)
    return scales


def _check_shapes(module: str, a: torch.Tensor, b: torch.Tensor, shape: tuple[int, int]) -> None:
    out_features, in_features = shape
    if a.ndim != 2 or a.shape[1] != in_features or a.shape[0] < 1:
        raise AdapterInvalidError(f"{module}{_A}: is {list(a.shape)}, the base needs [rank, {in_features}]")
    if tuple(b.shape) != (out_features, a.shape[0]):
        raise AdapterInvalidError(
            f"{module}{_B}: is {list(b.shape)}, the base and lora_A need [{out_features}, {a.shape[0]}]"
        )


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


METHOD = LoraMethod()
