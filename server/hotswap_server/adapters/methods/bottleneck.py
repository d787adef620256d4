"""Bottleneck adapters (Houlsby et al., 2019; Pfeiffer et al., 2020; parallel: He et al., 2021).

With x a sub-layer's output, s the residual stream and f(z) = scaling * up(activation(down(z))), the layouts
are houlsby: x + f(x), pfeiffer: x + f(x + s), parallel: x + f(s). Without `residual` x itself is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from hotswap_server.adapters.checkpoint import RawCheckpoint
from hotswap_server.adapters.fields import MODULE_PREFIX, check_fields
from hotswap_server.adapters.method import BankOptions, shown_fields
from hotswap_server.adapters.transfer import Writes, packed
from hotswap_server.engine.attention import StepState
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.blocks import ATTENTION, MLP, Block
from hotswap_server.errors import AdapterInvalidError
from hotswap_server.kernels import Activation, BottleneckLayout, BottleneckTable

C = TypeVar("C")

_PLACES = {ATTENTION: "after_attention", MLP: "after_mlp"}
_READ = frozenset(
    {
        *("bottleneck_size", "reduction_factor", "activation", "after_attention", "after_mlp"),
        *("layout", "scaling", "residual", "layers"),
    }
)
_ACTIVATIONS = {
    "relu": Activation.RELU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_NEW,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "tanh": Activation.TANH,
    "sigmoid": Activation.SIGMOID,
    "leakyrelu": Activation.LEAKY_RELU,
}
_LAYOUTS = {layout.name.lower(): layout for layout in BottleneckLayout}
_PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


@dataclass(frozen=True, slots=True)
class BottleneckWeights:
    """One block's `down` and `up` [size, hidden_size] with their biases; `up` and its bias are scaled."""

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.down, self.down_bias, self.up, self.up_bias))


@dataclass(frozen=True, slots=True)
class BottleneckAdapter:
    """`weights` by the block's name, such as `model.layers.3.mlp_adapter`."""

    weights: Mapping[str, BottleneckWeights]
    activation: Activation
    layout: BottleneckLayout
    residual: bool
    nbytes: int
    num_parameters: int
    details: Mapping[str, str]
    method: str = field(default="bottleneck", init=False)


class BottleneckBank:
    """A table for every block. A block's tensors are made when an adapter first touches it."""

    def __init__(self, base: BaseModel, options: BankOptions) -> None:
        self.num_slots = options.num_slots
        self._base = base
        self._max_size = options.max_bottleneck_size
        self._tables: dict[Block, BottleneckTable] = {}

    def put(self, slot: int, adapter: BottleneckAdapter) -> None:
        writes = Writes()
        for block in self._base.blocks:
            weights = adapter.weights.get(_name(block))
            if weights is None:
                if block in self._tables:
                    writes.add_numbers(self._tables[block].sizes[slot : slot + 1], [0])
                continue
            table = self._tables.get(block) or self._allocate(block)
            size = weights.down.shape[0]
            writes.add(table.down[slot, :size], weights.down)
            writes.add(table.down_bias[slot, :size], weights.down_bias)
            writes.add(table.up[slot, :size], weights.up)
            writes.add(table.up_bias[slot], weights.up_bias)
            for place, number in (
                (table.activations, adapter.activation),
                (table.layouts, adapter.layout),
                (table.residuals, adapter.residual),
                (table.sizes, size),
            ):
                writes.add_numbers(place[slot : slot + 1], [int(number)])
        writes.run()
        self._base.state.mark(METHOD.name, slot, adapter.weights.keys())

    def _allocate(self, block: Block) -> BottleneckTable:
        slots, size, hidden = self.num_slots, self._max_size, block.hidden_size

        def empty(*shape: int) -> torch.Tensor:
            # Rows beyond a size are never read, so on a CPU they never take memory either.
            return torch.empty(*shape, dtype=self._base.dtype, device=self._base.device)

        def zeros() -> torch.Tensor:
            return torch.zeros(slots, dtype=torch.int32, device=self._base.device)

        table = BottleneckTable(
            down=empty(slots, size, hidden),
            down_bias=empty(slots, size),
            up=empty(slots, size, hidden),
            up_bias=empty(slots, hidden),
            sizes=zeros(),
            activations=zeros(),
            layouts=zeros(),
            residuals=zeros(),
        )
        self._tables[block] = table
        block.deltas.append(_BottleneckDelta(self._base.state, block, table))
        return table


class _BottleneckDelta:
    method = "bottleneck"

    def __init__(self, state: StepState, block: Block, table: BottleneckTable) -> None:
        self._state = state
        self._block = block
        self._table = table

    def __call__(self, x: torch.Tensor, stream: torch.Tensor) -> None:
        slots, kernels = self._state.slots.get(self.method), self._state.kernels
        if slots is None:
            return
        if (pending := self._block.take_pending()) is None:
            kernels.bottleneck(stream, x, self._table, slots)
        else:
            kernels.bottleneck_and_expand(stream, x, self._table, slots, pending)


class BottleneckMethod:
    """Reads BOTTLENECK checkpoints, PEFT directories with AdapterHub's kind of adapters.

    Tensors are named `base_model.model.LAYER.PLACE_adapter.down.weight` [size, hidden] and `down.bias`,
    `up.weight` [hidden, size], `up.bias`, with the decoder layer's module name and `attention` or `mlp`.
    """

    name = "bottleneck"
    peft_type = "BOTTLENECK"

    def create_bank(self, base: BaseModel, options: BankOptions) -> BottleneckBank:
        return BottleneckBank(base, options)

    def bank_bytes(self, base: BaseModel, options: BankOptions) -> int:
        size = options.max_bottleneck_size
        elements = sum(2 * size * block.hidden_size + size + block.hidden_size for block in base.blocks)
        numbers = 4 * len(base.blocks)
        return options.num_slots * (elements * base.dtype.itemsize + numbers * torch.int32.itemsize)

    def parse(self, checkpoint: RawCheckpoint, base: BaseModel, options: BankOptions) -> BottleneckAdapter:
        config, tensors = checkpoint.config, checkpoint.tensors
        check_fields(config, read=_READ, without_effect=frozenset())
        activation = _choice(config, "activation", _ACTIVATIONS)
        layout = _choice(config, "layout", _LAYOUTS)
        residual = _flag(config, "residual")
        if layout is BottleneckLayout.PARALLEL and not residual:
            raise AdapterInvalidError(
                "adapter_config.json: residual must be true in the parallel layout, whose adapter stands "
                "beside the sub-layer"
            )
        scaling = _number(config, "scaling")
        blocks = _selected(config, base)
        _check_names({f"{MODULE_PREFIX}{name}.{part}" for name in blocks for part in _PARTS}, set(tensors))
        weights = {}
        for name, block in blocks.items():
            size = _size(config, block.hidden_size)
            if size > options.max_bottleneck_size:
                raise AdapterInvalidError(
                    f"{name}: size {size} is over this server's limit of {options.max_bottleneck_size}; "
                    "start it with a larger max_bottleneck_size"
                )
            parts = [tensors[f"{MODULE_PREFIX}{name}.{part}"] for part in _PARTS]
            shapes = ([size, block.hidden_size], [size], [block.hidden_size, size], [block.hidden_size])
            for part, tensor, shape in zip(_PARTS, parts, shapes, strict=True):
                if list(tensor.shape) != shape:
                    raise AdapterInvalidError(
                        f"tensor {name}.{part}: is {list(tensor.shape)}, adapter_config.json "
                        f"(bottleneck_size, reduction_factor) and the base need {shape}"
                    )
            down, down_bias, up, up_bias = parts
            weights[name] = BottleneckWeights(
                down=down.to(base.dtype),
                down_bias=down_bias.to(base.dtype),
                up=(up.float() * scaling).t().to(base.dtype).contiguous(),
                up_bias=(up_bias.float() * scaling).to(base.dtype),
            )
        if base.device.type == "cuda":
            loose = [t for w in weights.values() for t in (w.down, w.down_bias, w.up, w.up_bias)]
            quarters = iter(packed(loose))
            weights = {
                name: BottleneckWeights(*four)
                for name, four in zip(weights, zip(*[quarters] * 4, strict=True), strict=True)
            }
        return BottleneckAdapter(
            weights=weights,
            activation=activation,
            layout=layout,
            residual=residual,
            nbytes=sum(entry.nbytes for entry in weights.values()),
            num_parameters=sum(tensor.numel() for tensor in tensors.values()),
            details=shown_fields(config, sorted(_READ)),
        )


def _name(block: Block) -> str:
    return f"{block.layer}.{block.place}_adapter"


def _selected(config: Mapping[str, object], base: BaseModel) -> dict[str, Block]:
    """The blocks that `layers`, `after_attention` and `after_mlp` mean, by name."""
    if not base.blocks:
        raise AdapterInvalidError(
            f"bottleneck: this base's sub-layers cannot be told ({base.blocks_problem}); adapt it with LoRA"
        )
    places = {place for place, name in _PLACES.items() if _flag(config, name)}
    if not places:
        raise AdapterInvalidError(
            "adapter_config.json: after_attention and after_mlp are both false, so nothing is adapted"
        )
    layers = list(dict.fromkeys(block.layer for block in base.blocks))
    chosen = config.get("layers")
    if chosen is not None:
        if not isinstance(chosen, list) or not chosen or not all(map(_is_count, chosen)):
            raise AdapterInvalidError(
                "adapter_config.json: layers must be null or a list of whole numbers from 0 on, "
                f"got {chosen!r}"
            )
        if max(chosen) >= len(layers):
            raise AdapterInvalidError(
                f"adapter_config.json: layers holds {max(chosen)}; the base has layers 0 to {len(layers) - 1}"
            )
        layers = [layers[index] for index in sorted(set(chosen))]
    return {_name(block): block for block in base.blocks if block.layer in layers and block.place in places}


def _size(config: Mapping[str, object], hidden_size: int) -> int:
    size = config.get("bottleneck_size")
    if size is None:
        factor = _number(config, "reduction_factor")
        if factor <= 0:
            raise AdapterInvalidError(f"adapter_config.json: reduction_factor must be over 0, got {factor}")
        return max(1, math.floor(hidden_size / factor))
    if not _is_count(size) or not isinstance(size, int) or size < 1:
        raise AdapterInvalidError(
            f"adapter_config.json: bottleneck_size must be null or a whole number over 0, got {size!r}"
        )
    return size


def _check_names(expected: set[str], present: set[str]) -> None:
    if missing := sorted(expected - present):
        raise AdapterInvalidError(f"tensor {missing[0]} is missing ({len(missing)} are)")
    if unused := sorted(present - expected):
        raise AdapterInvalidError(
            f"tensor {unused[0]}: adapter_config.json (layers, after_attention, after_mlp) and the base have "
            "no place for it, so nothing would use it"
        )


def _choice(config: Mapping[str, object], name: str, choices: Mapping[str, C]) -> C:
    value = config.get(name)
    if not isinstance(value, str) or value not in choices:
        raise AdapterInvalidError(
            f"adapter_config.json: {name} must be one of {', '.join(choices)}, got {value!r}"
        )
    return choices[value]


def _flag(config: Mapping[str, object], name: str) -> bool:
    value = config.get(name)
    if not isinstance(value, bool):
        raise AdapterInvalidError(f"adapter_config.json: {name} must be true or false, got {value!r}")
    return value


def _number(config: Mapping[str, object], name: str) -> float:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterInvalidError(
            f"adapter_config.json: {name} must be a number, got {value!r}; a learned one is not served"
        )
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


METHOD = BottleneckMethod()
