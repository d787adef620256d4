"""PEFT's configuration of a bottleneck adapter: the content of its `adapter_config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from peft import PeftConfig
from peft.utils.peft_types import PeftType

PEFT_TYPE: Final = "BOTTLENECK"
ACTIVATIONS: Final = ("relu", "gelu", "gelu_new", "silu", "swish", "tanh", "sigmoid", "leakyrelu")
LAYOUTS: Final = ("houlsby", "pfeiffer", "parallel")


def _add_peft_type() -> None:
    """PEFT's types are a closed enum, and its registry takes members only: add ours, once."""
    if PEFT_TYPE in PeftType.__members__:
        return
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    type.__setattr__(PeftType, PEFT_TYPE, member)


_add_peft_type()


@dataclass
class BottleneckConfig(PeftConfig):
    """With f(z) = scaling * up(activation(down(z))), x a sub-layer's output and s the residual stream:

    - `houlsby`: x + f(x)
    - `pfeiffer`: x + f(x + s)
    - `parallel`: x + f(s), where s is taken before the sub-layer's input norm

    x is what the model adds to its residual stream: taken after an output norm where the model has one.

    Raises:
        ValueError: a value that has no meaning; the message names the field.
    """

    bottleneck_size: int | None = field(default=64, metadata={"help": "Width of the bottleneck."})
    reduction_factor: float = field(
        default=16.0,
        metadata={"help": "Width as the base's hidden size over this; for a bottleneck_size of None."},
    )
    activation: str = field(default="relu", metadata={"help": f"One of {', '.join(ACTIVATIONS)}."})
    after_attention: bool = field(default=True, metadata={"help": "Adapt the attention's output."})
    after_mlp: bool = field(default=True, metadata={"help": "Adapt the MLP's output."})
    layout: str = field(default="houlsby", metadata={"help": f"One of {', '.join(LAYOUTS)}."})
    scaling: float = field(default=1.0, metadata={"help": "Factor of the adapter's output."})
    residual: bool = field(
        default=True, metadata={"help": "Whether x itself stays in the result; always so in parallel."}
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "Decoder layers to adapt; None: all of them."}
    )

    # PEFT's injection asks every configuration for it.
    target_modules: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(PEFT_TYPE)
        names = f"one of {', '.join(ACTIVATIONS)}"
        size_fits = self.bottleneck_size is None or _is_count(self.bottleneck_size, 1)
        self._require(size_fits, "bottleneck_size", "a whole number over 0, or None")
        factor_fits = _is_number(self.reduction_factor) and self.reduction_factor > 0
        self._require(factor_fits, "reduction_factor", "a number over 0")
        self._require(self.activation in ACTIVATIONS, "activation", names)
        self._require(self.layout in LAYOUTS, "layout", f"one of {', '.join(LAYOUTS)}")
        self._require(_is_number(self.scaling), "scaling", "a number; a learned one is not supported")
        for name in ("after_attention", "after_mlp", "residual"):
            self._require(isinstance(getattr(self, name), bool), name, "true or false")
        if not (self.after_attention or self.after_mlp):
            raise ValueError("after_attention, after_mlp: at least one must be true")
        if self.layout == "parallel" and not self.residual:
            raise ValueError("residual: must be true in the parallel layout, whose adapter stands beside x")
        if self.layers is not None:
            distinct = bool(self.layers) and len(set(self.layers)) == len(self.layers)
            layers_fit = distinct and all(_is_count(layer, 0) for layer in self.layers)
            self._require(layers_fit, "layers", "different whole numbers from 0 on, or None for all layers")
            self.layers = sorted(self.layers)

    def size(self, hidden_size: int) -> int:
        """Width of the bottleneck in a base of this hidden size."""
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        return max(1, math.floor(hidden_size / self.reduction_factor))

    @property
    def places(self) -> tuple[str, ...]:
        """`attention` and `mlp`, as far as they are adapted."""
        chosen = {"attention": self.after_attention, "mlp": self.after_mlp}
        return tuple(place for place, wanted in chosen.items() if wanted)

    def _require(self, ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ValueError(f"{name}: must be {rule}; got {getattr(self, name)!r}")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
