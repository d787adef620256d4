"""From what `--base` says to the configuration of a model. No weights are read, or fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hotswap.bases import BaseNotFoundError, resolve_base
from hotswap.shapes import SHAPES

from hotswap_trainer.errors import OptionError


def read_config(spec: str) -> Any:
    """The transformers configuration of a directory, a shape in `SHAPES`, or a hub id.

    Raises:
        OptionError: there is no such model, or it is no language model that generates.
    """
    from transformers import AutoConfig, LlamaConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if spec in SHAPES and not Path(spec).exists():
        return LlamaConfig(**SHAPES[spec])
    try:
        local = resolve_base(spec) if "/" not in spec or Path(spec).expanduser().exists() else spec
        config: Any = AutoConfig.from_pretrained(local)
    except BaseNotFoundError as error:
        raise OptionError(f"--{error}; or a size such as 7b, or a shape: {', '.join(SHAPES)}") from error
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(
            f"--base: {spec} cannot be read: {_first_line(error)}; give a transformers directory, a hub id "
            f"that can be reached, a size such as 7b, or a shape: {', '.join(SHAPES)}"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise OptionError(
            f"--base: {spec} is a {config.model_type}, no causal language model; give one that generates text"
        )
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # what is planned is the plain model
    return config


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
