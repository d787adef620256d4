"""IA³ (Liu et al., 2022): a learned scale on a projection's output or, feed-forward, its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from hotswap_server.adapters.checkpoint import RawCheckpoint
from hotswap_server.adapters.copies import is_copy
from hotswap_server.adapters.fields import MODULE_PREFIX, check_fields, check_targets
from hotswap_server.adapters.method import BankOptions, shown_fields
from hotswap_server.adapters.scales import ScaleTable
from hotswap_server.adapters.targets import matches, target_modules
from hotswap_server.engine.attention import StepState
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.projection import ProjectionGroup
from hotswap_server.errors import AdapterInvalidError

_SUFFIX = ".ia3_l"
_READ = frozenset({"target_modules", "feedforward_modules", "exclude_modules"})
_WITHOUT_EFFECT = frozenset({"init_ia3_weights"})


@dataclass(frozen=True, slots=True)
class Ia3Adapter:
    """Scales by module: of its output [out_features], or of its input [in_features]."""

    output_scales: Mapping[str, torch.Tensor]
    input_scales: Mapping[str, torch.Tensor]
    nbytes: int
    num_parameters: int
    details: Mapping[str, str]
    method: str = field(default="ia3", init=False)


class Ia3Bank:
    """A table of scales for each group whose output, or input, an adapter has touched."""

    def __init__(self, base: BaseModel, options: BankOptions) -> None:
        self.num_slots = options.num_slots
        self._base = base
        self._outputs: dict[ProjectionGroup, ScaleTable] = {}
        self._inputs: dict[ProjectionGroup, ScaleTable] = {}

    def put(self, slot: int, adapter: Ia3Adapter) -> None:
        for group in self._base.groups:
            at_logits = group is self._base.head
            if group not in self._outputs and any(name in adapter.output_scales for name in group.names):
                table = ScaleTable(self._base, self.num_slots, sum(group.widths))
                self._outputs[group] = table
                group.deltas.append(_OutputScale(self._base.state, table, at_logits))
            if group not in self._inputs and group.names[0] in adapter.input_scales:
                table = ScaleTable(self._base, self.num_slots, group.in_features)
                self._inputs[group] = table
                group.inputs.append(_InputScale(self._base.state, table, at_logits))
        for group, table in self._outputs.items():
            table.reset(slot)
            for name, offset in zip(group.names, group.offsets, strict=True):
                if (scale := adapter.output_scales.get(name)) is not None:
                    table.put(slot, offset, scale)
        for group, table in self._inputs.items():
            table.reset(slot)
            if (scale := adapter.input_scales.get(group.names[0])) is not None:
                table.put(slot, 0, scale)
        self._base.state.mark(METHOD.name, slot, {*adapter.output_scales, *adapter.input_scales})


class _Scale:
    def __init__(self, state: StepState, table: ScaleTable, at_logits: bool) -> None:
        self._state = state
        self._table = table
        self._at_logits = at_logits

    def factors(self) -> torch.Tensor | None:
        """Of this step's rows, if an adapter of the batch has any."""
        slots = self._state.slots_of(METHOD.name, self._table.touched, at_logits=self._at_logits)
        return None if slots is None else self._table.rows(slots)


class _OutputScale(_Scale):
    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if (factors := self.factors()) is not None:
            out.mul_(factors)


class _InputScale(_Scale):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        factors = self.factors()
        return x if factors is None else x * factors


class Ia3Method:
    """Reads PEFT's IA3 checkpoints."""

    name = "ia3"
    peft_type = "IA3"

    def create_bank(self, base: BaseModel, options: BankOptions) -> Ia3Bank:
        return Ia3Bank(base, options)

    def bank_bytes(self, base: BaseModel, options: BankOptions) -> int:
        features = sum(sum(group.widths) for group in base.groups)
        features += sum(group.in_features for group in base.groups if len(group.names) == 1)
        return ScaleTable.size(options.num_slots, features) * base.dtype.itemsize

    def parse(self, checkpoint: RawCheckpoint, base: BaseModel, options: BankOptions) -> Ia3Adapter:
        config = checkpoint.config
        check_fields(config, read=_READ, without_effect=_WITHOUT_EFFECT)
        scales = {}
        for name, tensor in checkpoint.tensors.items():
            if is_copy(name, tensor, base):
                continue
            if not (name.startswith(MODULE_PREFIX) and name.endswith(_SUFFIX)):
                raise AdapterInvalidError(f"tensor {name}: is no part of an IA3, and nothing would use it")
            scales[name[len(MODULE_PREFIX) : -len(_SUFFIX)]] = tensor
        shapes = base.linear_shapes | base.head_shape
        check_targets(target_modules(config, shapes, linears=base.linear_shapes), set(scales), _SUFFIX)
        groups = {name: group for group in base.groups for name in group.names}
        outputs: dict[str, torch.Tensor] = {}
        inputs: dict[str, torch.Tensor] = {}
        for module, tensor in scales.items():
            out_features, in_features = shapes[module]
            feed_forward = matches(config, "feedforward_modules", module)
            shape = (1, in_features) if feed_forward else (out_features, 1)
            if tuple(tensor.shape) != shape:
                raise AdapterInvalidError(
                    f"tensor {module}{_SUFFIX}: is {list(tensor.shape)}, the base needs {list(shape)}"
                )
            if feed_forward and len(groups[module].names) > 1:
                raise AdapterInvalidError(
                    f"adapter_config.json: feedforward_modules holds {module}, which shares its input with "
                    "other layers; scale its output instead, or adapt down_proj"
                )
            (inputs if feed_forward else outputs)[module] = tensor.flatten().to(base.dtype)
        return Ia3Adapter(
            output_scales=outputs,
            input_scales=inputs,
            nbytes=sum(scale.nbytes for scale in (*outputs.values(), *inputs.values())),
            num_parameters=sum(scale.numel() for scale in scales.values()),
            details=shown_fields(config, ("target_modules", "feedforward_modules")),
        )


METHOD = Ia3Method()
