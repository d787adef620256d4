"""Bottleneck adapters: small networks after the attention and the MLP (https://arxiv.org/abs/1902.00751)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hotswap_trainer.errors import OptionError
from hotswap_trainer.method import Method
from hotswap_trainer.options import option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hotswap_trainer.methods.bottleneck.tuner import BottleneckConfig


@dataclass(frozen=True, slots=True)
class BottleneckOptions:
    """Options of bottleneck adapters; `tuner.BottleneckConfig` says what each layout computes."""

    bottleneck_size: int | None = option(None, help="Width of the bottleneck; 64 without --reduction-factor.")
    reduction_factor: float | None = option(None, help="Width as the base's hidden size over this, instead.")
    activation: Literal["relu", "gelu", "gelu_new", "silu", "swish", "tanh", "sigmoid", "leakyrelu"] = option(
        "relu", help="Activation in the bottleneck."
    )
    after_attention: bool = option(True, help="Adapt the attention's output.")
    after_mlp: bool = option(True, help="Adapt the MLP's output.")
    layout: Literal["houlsby", "pfeiffer", "parallel"] = option(
        "houlsby", help="What an adapter reads: the output, output and residual stream, or the stream alone."
    )
    scaling: float = option(1.0, help="Factor of an adapter's output.")
    residual: bool = option(True, help="Keep the sub-layer's output beside the adapter's.")
    layers: tuple[int, ...] | None = option(None, help="Decoder layers to adapt, such as 0-5,8.")

    def __post_init__(self) -> None:
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise OptionError("--bottleneck-size: give it or --reduction-factor, not both")
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise OptionError(f"--bottleneck-size: must be at least 1, got {self.bottleneck_size}")
        if self.reduction_factor is not None and not 0 < self.reduction_factor < float("inf"):
            raise OptionError(f"--reduction-factor: must be over 0, got {self.reduction_factor}")
        if not abs(self.scaling) < float("inf"):
            raise OptionError(f"--scaling: must be a finite number, got {self.scaling}")
        if not (self.after_attention or self.after_mlp):
            raise OptionError("--no-after-attention: leaves nothing to adapt beside --no-after-mlp")
        if self.layout == "parallel" and not self.residual:
            raise OptionError("--no-residual: has no meaning in the parallel layout")


class BottleneckMethod(Method[BottleneckOptions]):
    name = "bottleneck"
    summary = "small networks after attention and MLP"
    learning_rate = 1e-3
    options = BottleneckOptions

    def peft_config(self, model: PreTrainedModel, options: BottleneckOptions) -> BottleneckConfig:
        from hotswap_trainer.methods.bottleneck.tuner import BottleneckConfig

        factor = options.reduction_factor
        return BottleneckConfig(
            task_type="CAUSAL_LM",
            bottleneck_size=None if factor is not None else options.bottleneck_size or 64,
            reduction_factor=factor if factor is not None else BottleneckConfig.reduction_factor,
            activation=options.activation,
            after_attention=options.after_attention,
            after_mlp=options.after_mlp,
            layout=options.layout,
            scaling=options.scaling,
            residual=options.residual,
            layers=list(options.layers) if options.layers is not None else None,
        )

    def loading(self) -> str:
        return (
            "import hotswap_trainer.methods.bottleneck.tuner  # makes PEFT know the method\n"
            + super().loading()
        )

    def attach(self, model: PreTrainedModel, options: BottleneckOptions) -> Any:
        try:
            return super().attach(model, options)
        except ValueError as error:
            # The tuner's errors begin with its field, whose flag has the same name.
            field, colon, reason = str(error).partition(": ")
            flag = f"--{field}" if colon and field == "layers" else "--base"
            raise OptionError(f"{flag}: {reason if flag == '--layers' else error}") from error


METHOD = BottleneckMethod()
