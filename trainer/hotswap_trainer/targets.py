"""The option `--target-modules` of the methods that adapt layers by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hotswap_trainer.errors import OptionError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


def check_pattern(flag: str, targets: str) -> None:
    """Refuse what is neither names nor a regex.

    Raises:
        OptionError: names the flag.
    """
    if not targets.strip(", "):
        raise OptionError(f"{flag}: must not be empty")
    if not is_names(targets):
        try:
            re.compile(targets)
        except re.error as error:
            raise OptionError(f"{flag}: is not a valid regex: {error}") from error


def is_names(targets: str) -> bool:
    """Whether `targets` are names separated by commas, or all-linear, and not a regex."""
    return re.fullmatch(r"[\w.,\s-]+", targets) is not None


def peft_targets(targets: str) -> str | list[str]:
    """`targets` as PEFT wants them: a regex and all-linear as they are, names as a list."""
    if targets == ALL_LINEAR or not is_names(targets):
        return targets
    return [name.strip() for name in targets.split(",") if name.strip()]


def has_name(layer: str, name: str) -> bool:
    """Whether `name` means the layer: it is its full name, or the end of it."""
    return layer == name or layer.endswith(f".{name}")


def attach(model: PreTrainedModel, config: Any, targets: str) -> Any:
    """`get_peft_model`, refusing targets of which some match nothing.

    Raises:
        OptionError: names the layers that there are.
    """
    from peft import get_peft_model

    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise OptionError(explain(model, targets, str(error))) from error
    require_matches(model, adapted.targeted_module_names, targets)
    return adapted


def require_matches(model: PreTrainedModel, targeted: Iterable[str], targets: str) -> None:
    """Refuse a name that matches none of the layers that PEFT adapted, which PEFT accepts."""
    names, targeted = peft_targets(targets), list(targeted)
    for name in names if isinstance(names, list) else []:
        if not any(has_name(layer, name) for layer in targeted):
            raise OptionError(explain(model, targets, f"{name} matches no layer of this base"))


def explain(model: nn.Module, targets: str, reason: str) -> str:
    """A refusal of `--target-modules`, with the names that would have worked."""
    if "not found in the base model" in reason or "No modules were targeted" in reason:
        reason = f"{targets} matches no layer of this base"
    reason = reason.partition("\n")[0].rstrip(". ")
    names = ", ".join(sorted(linear_names(model)))
    return f"--target-modules: {reason}; its linear layers are {names} (or all-linear)"


def linear_names(model: nn.Module) -> set[str]:
    """The last parts of the names of the decoder's linear layers, adapted or not."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.nn import Linear

    return {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, Linear | BaseTunerLayer)
        and not re.search(r"lm_head|lora_|base_layer|embed", name)
    }
