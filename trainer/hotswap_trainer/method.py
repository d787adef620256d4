"""What a training method is: the shape of every file in `methods/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

OptionsT = TypeVar("OptionsT")


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

    @abstractmethod
    def peft_config(self, model: PreTrainedModel, options: OptionsT) -> PeftConfig:
        """PEFT's configuration of the method for this base.

        Raises:
            OptionError: the options do not fit the base.
        """

    def base_arguments(self, options: OptionsT) -> dict[str, Any]:
        """Further arguments of `AutoModelForCausalLM.from_pretrained`, such as a quantization_config."""
        return {}

    def attach(self, model: PreTrainedModel, options: OptionsT) -> Any:
        """The model to train: the base with the method's trainable parameters, the others frozen."""
        from peft import get_peft_model

        return get_peft_model(model, self.peft_config(model, options))

    def write(self, model: Any, directory: Path, *, base: str) -> None:
        """Write the trained weights and their configuration, naming the base as the user did."""
        for config in model.peft_config.values():
            config.base_model_name_or_path = base
            if isinstance(getattr(config, "target_modules", None), set):
                config.target_modules = sorted(config.target_modules)  # the same bytes from the same run
        # PEFT would ask the hub whether the base's vocabulary was changed; the trainer never does that.
        model.save_pretrained(str(directory), save_embedding_layers=False)
