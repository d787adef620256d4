"""What a training method is: the shape of every file in `methods/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from hotswap.layout import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from hotswap_trainer.config import TrainOptions

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished model: `base` is named as the user named it, `dtype` is what the run computed in."""

    model: Any
    tokenizer: Any
    base: str
    dtype: torch.dtype


class Method(ABC, Generic[OptionsT]):
    """How an adapter changes the base. One file in `methods/` defines one and calls it `METHOD`.

    A method that PEFT knows implements `peft_config` alone. The other hooks are for methods that load the
    base in another way (in 4 bits), wrap it without PEFT, or write something else than an adapter.
    Heavy libraries are imported inside the hooks: the command line reads every method's options.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    learning_rate: ClassVar[float]  # the default peak rate of AdamW
    options: type[OptionsT]  # a dataclass whose fields are made by `hotswap_trainer.options.option`
    result: ClassVar[str] = "adapter"  # what the summary and the card call what is published
    library: ClassVar[str] = "peft"  # what loads it
    files: ClassVar[tuple[str, ...]] = (CONFIG_FILE, WEIGHTS_FILE)  # without these there is no version

    def check(self, run: TrainOptions, options: OptionsT) -> None:
        """Refuse options of the run that the method cannot honour.

        Raises:
            OptionError: names the option and the remedy.
        """
        return

    @abstractmethod
    def peft_config(self, model: PreTrainedModel, options: OptionsT) -> PeftConfig:
        """PEFT's configuration of the method for this base.

        Raises:
            OptionError: the options do not fit the base.
        """

    def base_arguments(self, options: OptionsT, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of `AutoModelForCausalLM.from_pretrained`. `dtype` is what the run computes in."""
        return {"dtype": dtype}

    def attach(self, model: PreTrainedModel, options: OptionsT) -> Any:
        """The model to train: the base with the method's trainable parameters, the others frozen."""
        from peft import get_peft_model

        return get_peft_model(model, self.peft_config(model, options))

    def write(self, trained: Trained, directory: Path) -> None:
        """Write the trained weights and their configuration."""
        for config in trained.model.peft_config.values():
            config.base_model_name_or_path = trained.base
            for name, value in vars(config).items():
                if isinstance(value, set):
                    setattr(config, name, sorted(value))  # the same bytes from the same run
        # PEFT would ask the hub whether the base's vocabulary was changed; the trainer never does that.
        trained.model.save_pretrained(str(directory), save_embedding_layers=False)

    def serving(self, run: TrainOptions, path: Path | str) -> str:
        """The command that serves what was published at `path`."""
        return f"hotswap serve --base {run.base} --store {run.output}"

    def loading(self) -> str:
        """Python that loads what was published from `directory` onto `base`."""
        return "from peft import PeftModel\nmodel = PeftModel.from_pretrained(base, directory)"
