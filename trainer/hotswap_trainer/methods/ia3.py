"""(IA)³: trained scales of keys, values and the MLP's inner activations (https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotswap_trainer import targets
from hotswap_trainer.errors import OptionError
from hotswap_trainer.method import Method
from hotswap_trainer.options import option

if TYPE_CHECKING:
    from peft import IA3Config
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Ia3Options:
    """Options of (IA)³. The defaults suit Llama-like models."""

    target_modules: str = option(
        "k_proj,v_proj,down_proj", help="Layers to scale: names separated by commas, or a regex."
    )
    feedforward_modules: str = option(
        "down_proj", help="Those of them whose input is scaled, not their output; may be empty."
    )

    def __post_init__(self) -> None:
        targets.check_pattern("--target-modules", self.target_modules)
        if self.feedforward_modules:
            targets.check_pattern("--feedforward-modules", self.feedforward_modules)


class Ia3(Method[Ia3Options]):
    """One factor per output of a layer or, of a feed-forward one, per input; they start at one."""

    name = "ia3"
    summary = "trained scales of keys, values and the MLP's inner activations"
    learning_rate = 5e-3
    options = Ia3Options

    def peft_config(self, model: PreTrainedModel, options: Ia3Options) -> IA3Config:
        from peft import IA3Config

        target = targets.peft_targets(options.target_modules)
        feedforward = targets.peft_targets(options.feedforward_modules) if options.feedforward_modules else []
        if targets.ALL_LINEAR in (target, feedforward):
            raise OptionError("--target-modules: (IA)³ needs the layers' names; all-linear is LoRA's")
        if isinstance(target, list) and isinstance(feedforward, list) and not set(feedforward) <= set(target):
            raise OptionError("--feedforward-modules: each must be one of --target-modules too")
        return IA3Config(
            task_type="CAUSAL_LM",
            target_modules=target,
            feedforward_modules=feedforward,
        )

    def attach(self, model: PreTrainedModel, options: Ia3Options) -> Any:
        return targets.attach(model, self.peft_config(model, options), options.target_modules)


METHOD = Ia3()
