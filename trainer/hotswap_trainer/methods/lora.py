"""LoRA: a trainable low-rank update beside frozen linear layers (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotswap_trainer.errors import OptionError
from hotswap_trainer.method import Method
from hotswap_trainer.options import option

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """Options of LoRA; a layer's update is `alpha / rank` (rsLoRA: `alpha / sqrt(rank)`) times `B A x`."""

    # torchrun takes a bare `--r` for an abbreviation of its own options, so it is the second spelling.
    rank: int = option(16, help="Rank of the updates.", short="--r")
    alpha: float | None = option(None, help="Scale; by default twice the rank.")
    dropout: float = option(0.0, help="Dropout on the input of the update.")
    target_modules: str = option(
        ALL_LINEAR, help="Layers to adapt: names separated by commas, all-linear, or a regex of full names."
    )
    rslora: bool = option(False, help="Scale by alpha/sqrt(rank): steadier at high ranks.")
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
        if not self.target_modules.strip(", "):
            raise OptionError("--target-modules: must not be empty")
        if not _is_names(self.target_modules):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise OptionError(f"--target-modules: is not a valid regex: {error}") from error


class Lora(Method[LoraOptions]):
    name = "lora"
    summary = "low-rank updates beside frozen linear layers"
    learning_rate = 5e-4
    options = LoraOptions

    def peft_config(self, model: PreTrainedModel, options: LoraOptions) -> LoraConfig:
        from peft import LoraConfig

        alpha = options.alpha if options.alpha is not None else 2.0 * options.rank
        _check_layers(model, options)
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=options.rank,
            lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
            lora_dropout=options.dropout,
            target_modules=_targets(options.target_modules),
            use_rslora=options.rslora,
            rank_pattern=options.rank_pattern or {},
            alpha_pattern=options.alpha_pattern or {},
            layers_to_transform=list(options.layers_to_transform) if options.layers_to_transform else None,
            bias="none",
        )

    def attach(self, model: PreTrainedModel, options: LoraOptions) -> Any:
        try:
            adapted = super().attach(model, options)
        except ValueError as error:
            raise OptionError(_explain(model, options, str(error))) from error
        _check_matches(model, adapted.targeted_module_names, options)
        return adapted


METHOD = Lora()


def _is_names(targets: str) -> bool:
    return re.fullmatch(r"[\w.,\s-]+", targets) is not None


def _targets(targets: str) -> str | list[str]:
    if targets == ALL_LINEAR or not _is_names(targets):
        return targets
    return [name.strip() for name in targets.split(",") if name.strip()]


def _check_layers(model: PreTrainedModel, options: LoraOptions) -> None:
    if options.layers_to_transform is None:
        return
    if options.target_modules == ALL_LINEAR or not _is_names(options.target_modules):
        raise OptionError("--layers-to-transform: needs --target-modules with names, such as q_proj,v_proj")
    count = model.config.get_text_config().num_hidden_layers
    if max(options.layers_to_transform) >= count:
        raise OptionError(f"--layers-to-transform: the base has layers 0 to {count - 1}")


def _check_matches(model: PreTrainedModel, targeted: list[str], options: LoraOptions) -> None:
    """Refuse what PEFT accepts without doing anything, and what no server decodes."""
    import torch

    targets = _targets(options.target_modules)
    for name in targets if isinstance(targets, list) else []:
        if not any(layer == name or layer.endswith(f".{name}") for layer in targeted):
            raise OptionError(_explain(model, options, f"{name} matches no layer of this base"))
    for layer in targeted:
        if isinstance(model.get_submodule(layer).get_base_layer(), torch.nn.Embedding):  # type: ignore[operator]
            raise OptionError(_explain(model, options, f"{layer} is an embedding, not a linear layer"))
    for flag, pattern in (("rank", options.rank_pattern), ("alpha", options.alpha_pattern)):
        for key in pattern or {}:
            if not any(re.match(rf"(.*\.)?({key})$", layer) for layer in targeted):  # as PEFT matches
                raise OptionError(f"--{flag}-pattern: {key} matches no adapted layer")


def _explain(model: PreTrainedModel, options: LoraOptions, reason: str) -> str:
    """A refusal, with the names that would have worked."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.nn import Linear

    linears = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, Linear | BaseTunerLayer)
        and not re.search(r"lm_head|lora_|base_layer|embed", name)
    }
    if "not found in the base model" in reason or "No modules were targeted" in reason:
        reason = f"{options.target_modules} matches no layer of this base"
    reason = reason.partition("\n")[0].rstrip(". ")
    return f"--target-modules: {reason}; its linear layers are {', '.join(sorted(linears))} (or all-linear)"
