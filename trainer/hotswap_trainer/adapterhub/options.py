"""The configuration of AdapterHub's bottlenecks: what ours can express, and refusals by name of the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotswap_trainer.errors import CheckpointError

CONFIG = "adapter_config.json"

# Their decoder layers are AdapterHub's own; others go through hooks, which put adapters in other places.
_MODEL_TYPES = ("llama", "mistral")
# Options whose other values compute something else, and the one value of each that we compute.
_FIXED: Mapping[str, Any] = {
    "architecture": None,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "phm_layer": False,
    "cross_adapter": False,
    "inv_adapter": None,
    "original_ln_after": True,
}
_MEANINGS = {
    "ln_before": "a layer norm before the bottleneck",
    "ln_after": "a layer norm after the bottleneck",
    "use_gating": "a gate",
    "phm_layer": "hypercomplex (Compacter) layers",
    "cross_adapter": "an adapter after cross-attention",
    "inv_adapter": "an invertible adapter after the embeddings",
    "original_ln_after": "leaving out the model's own residual connection",
}
_READ = {
    *("mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "is_parallel", "scaling"),
    *("original_ln_before", "residual_before_ln", "leave_out"),
}
# Options of initialisation, of training, or of what _FIXED turns off.
_WITHOUT_EFFECT = re.compile(
    r"phm_.*|.*_phm.*|hypercomplex_nonlinearity|init_weights(_seed)?|dropout|stochastic_depth"
    r"|adapter_residual_before_ln|inv_adapter_reduction_factor"
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What an `adapter_config.json` of AdapterHub says, `options` with AdapterHub's defaults filled in."""

    name: str
    model_name: str
    hidden_size: int
    options: Mapping[str, Any]

    @property
    def layout(self) -> str:
        """Ours that computes the same."""
        if self.options["is_parallel"]:
            return "parallel"
        return "pfeiffer" if self.options["original_ln_before"] else "houlsby"

    @property
    def places(self) -> tuple[str, ...]:
        """`attention` and `mlp`, as far as they are adapted."""
        flags = {"attention": "mh_adapter", "mlp": "output_adapter"}
        return tuple(place for place, flag in flags.items() if self.options.get(flag))


def read_settings(directory: Path) -> Settings:
    """The checked configuration of a directory that AdapterHub wrote.

    Raises:
        CheckpointError: it is not AdapterHub's, not of a bottleneck, or means what ours cannot express.
    """
    try:
        whole = json.loads((directory / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG}: cannot be read: {error}") from error
    if isinstance(whole, dict) and "peft_type" in whole:
        raise CheckpointError(f"{CONFIG}: is PEFT's; copy the directory into the store as it is")
    if not isinstance(whole, dict) or not isinstance(whole.get("config"), dict) or "name" not in whole:
        raise CheckpointError(f"{CONFIG}: is not AdapterHub's: it lacks a name, or a config with all options")
    if whole.get("model_type") not in _MODEL_TYPES:
        supported = ", ".join(_MODEL_TYPES)
        raise CheckpointError(
            f"{CONFIG}: model_type {whole.get('model_type')!r} is not supported, only {supported}"
        )
    if not isinstance(whole.get("hidden_size"), int):
        raise CheckpointError(f"{CONFIG}: hidden_size must be a whole number")
    return Settings(
        name=str(whole["name"]),
        model_name=str(whole.get("model_name") or ""),
        hidden_size=whole["hidden_size"],
        options=_checked(whole["config"]),
    )


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {"original_ln_before": False, "residual_before_ln": True, "is_parallel": False}
    options = {**defaults, "scaling": 1.0, "leave_out": [], **config}
    for name, value in options.items():
        fixed = _FIXED.get(name)
        if name in _FIXED and value != fixed and (value or fixed):  # None and false say the same
            meaning = _MEANINGS.get(name, "another kind of adapter")
            raise CheckpointError(f"{CONFIG}: {name} = {value!r} is {meaning}, which is not supported")
        if name not in {*_FIXED, *_READ} and not _WITHOUT_EFFECT.fullmatch(name):
            raise CheckpointError(f"{CONFIG}: option {name} = {value!r} is unknown, so it may not be ignored")
    if isinstance(options["scaling"], str):
        raise CheckpointError(f"{CONFIG}: scaling {options['scaling']!r} is learned, which is not supported")
    if not isinstance(options.get("reduction_factor"), int | float):
        raise CheckpointError(f"{CONFIG}: a reduction_factor that differs by layer is not supported")
    reads_sum = options["original_ln_before"] and not options["is_parallel"]
    residual = options["residual_before_ln"]
    if residual == "post_add" or (reads_sum and residual is not True):
        raise CheckpointError(
            f"{CONFIG}: residual_before_ln = {residual!r} adds the residual stream twice, "
            "which is not supported"
        )
    return options
