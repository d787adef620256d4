"""LoRA: a trainable low-rank update beside frozen linear layers (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hotswap_trainer import targets
from hotswap_trainer.errors import OptionError
from hotswap_trainer.method import Method
from hotswap_trainer.options import option

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """Options of LoRA; a layer's update is `alpha / rank` (rsLoRA: `alpha / sqrt(rank)`) times `B A x`."""

    # torchrun takes a bare `--r` for an abbreviation of its own options, so it is the second spelling.
    rank: int = option(16, help="Rank of the updates.", short="--r")
    alpha: float | None = option(None, help="Scale; by default twice the rank.")
    dropout: float = option(0.0, help="Dropout on the input of the update.")
    target_modules: str = option(
        targets.ALL_LINEAR,
        help="Layers to adapt: names separated by commas, all-linear, or a regex of full names; "
        "lm_head and embed_tokens by name alone.",
    )
    rslora: bool = option(False, help="Scale by alpha/sqrt(rank): steadier at high ranks.")
    use_dora: bool = option(False, help="DoRA: train the length of each output's weights too.")
    bias: Literal["none", "all", "lora_only"] = option(
        "none", help="Train the base's own biases too: all of them, or those of adapted layers."
    )
    rank_pattern: dict[str, int] | None = option(None, help="Another rank for layers that match: NAME=RANK.")
    alpha_pattern: dict[str, float] | None = option(None, help="Another alpha for layers that match.")
    layers_to_transform: tuple[int, ...] | None = option(None, help="Decoder layers to adapt, such as 0-5,8.")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError(f"--rank: must be at least 1, got {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise OptionError(f"--alpha: must be over 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"--dropout: must be at least 0 and under 1, got {self.dropout}")
        if any(rank < 1 for rank in (self.rank_pattern or {}).values()):
            raise OptionError(f"--rank-pattern: ranks must be at least 1, got {self.rank_pattern}")
        targets.check_pattern("--target-modules", self.target_modules)


LoraOptionsT = TypeVar("LoraOptionsT", bound=LoraOptions)


class LoraMethod(Method[LoraOptionsT]):
    """Over any base; `--use-dora` is DoRA (https://arxiv.org/abs/2402.09353)."""

    def peft_config(self, model: PreTrainedModel, options: LoraOptionsT) -> LoraConfig:
        from peft import LoraConfig

        alpha = options.alpha if options.alpha is not None else 2.0 * options.rank
        _check_layers(model, options)
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=options.rank,
            lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
            lora_dropout=options.dropout,
            target_modules=targets.peft_targets(options.target_modules),
            use_rslora=options.rslora,
            use_dora=options.use_dora,
            rank_pattern=options.rank_pattern or {},
            alpha_pattern=options.alpha_pattern or {},
            layers_to_transform=list(options.layers_to_transform) if options.layers_to_transform else None,
            bias=options.bias,
        )

    def attach(self, model: PreTrainedModel, options: LoraOptionsT) -> Any:
        _check_bias(model, options)
        adapted = targets.attach(model, self.peft_config(model, options), options.target_modules)
        _check_patterns(adapted.targeted_module_names, options)
        return adapted


class Lora(LoraMethod[LoraOptions]):
    name = "lora"
    summary = "low-rank updates beside frozen linear layers"
    learning_rate = 5e-4
    options = LoraOptions


METHOD = Lora()


def _check_layers(model: PreTrainedModel, options: LoraOptions) -> None:
    if options.layers_to_transform is None:
        return
    if options.target_modules == targets.ALL_LINEAR or not targets.is_names(options.target_modules):
        raise OptionError("--layers-to-transform: needs --target-modules with names, such as q_proj,v_proj")
    count = model.config.get_text_config().num_hidden_layers
    if max(options.layers_to_transform) >= count:
        raise OptionError(f"--layers-to-transform: the base has layers 0 to {count - 1}")


def _check_bias(model: PreTrainedModel, options: LoraOptions) -> None:
    biased = any(name.rpartition(".")[2] == "bias" for name, _ in model.named_parameters())
    if options.bias != "none" and not biased:
        raise OptionError(f"--bias: {options.bias} would train nothing more: this base has no biases")


def _check_patterns(targeted: list[str], options: LoraOptions) -> None:
    for flag, pattern in (("rank", options.rank_pattern), ("alpha", options.alpha_pattern)):
        for key in pattern or {}:
            if not any(re.match(rf"(.*\.)?({key})$", layer) for layer in targeted):  # as PEFT matches
                raise OptionError(f"--{flag}-pattern: {key} matches no adapted layer")
