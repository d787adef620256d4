"""Full fine-tuning: every parameter is trained, and the result is a base of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hotswap_trainer.method import Method, Trained

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from hotswap_trainer.config import TrainOptions


@dataclass(frozen=True, slots=True)
class FullOptions:
    """Full fine-tuning has no options of its own."""


class Full(Method[FullOptions]):
    """Publishes OUTPUT/tenant/task/VERSION as a transformers directory, in the type that the run computed in.

    Weights and optimiser are held in float32: updates of the size of 1e-5 are lost in bfloat16. Where the run
    computes in bfloat16, it does so by autocast. A store's readers pass such a version over, as it holds no
    adapter.
    """

    name = "full"
    summary = "every parameter; the result is a base of its own"
    learning_rate = 2e-5
    options = FullOptions
    result = "base"
    library = "transformers"
    files = ("config.json", "model.safetensors", "tokenizer_config.json")

    def peft_config(self, model: PreTrainedModel, options: FullOptions) -> NoReturn:
        raise NotImplementedError("full fine-tuning does not go through PEFT")

    def base_arguments(self, options: FullOptions, dtype: torch.dtype) -> dict[str, Any]:
        import torch

        return {"dtype": torch.float32}

    def attach(self, model: PreTrainedModel, options: FullOptions) -> Any:
        return model.requires_grad_(True)

    def write(self, trained: Trained, directory: Path) -> None:
        trained.model.config.use_cache = True  # which the run turned off
        # One file, whatever its size.
        trained.model.to(trained.dtype).save_pretrained(str(directory), max_shard_size="100TB")
        trained.tokenizer.save_pretrained(str(directory))

    def serving(self, run: TrainOptions, path: Path | str) -> str:
        if isinstance(run.output, str):
            return f"hotswap serve --base DIR, with a copy of {path} in DIR"
        return f"hotswap serve --base {path}"

    def loading(self) -> str:
        return (
            "from transformers import AutoModelForCausalLM\n"
            "model = AutoModelForCausalLM.from_pretrained(directory)"
        )


METHOD = Full()
