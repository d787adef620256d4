"""Adapters that PEFT makes, and PEFT as the oracle of what they do."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hotswap_trainer.methods.bottleneck.tuner import BottleneckConfig
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from support.models import generate_greedily

ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Every form of a LoRA that is served, as PEFT's LoraConfig spells it.
LORA_VARIANTS: dict[str, dict[str, Any]] = {
    "qv": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank_1": {"r": 1, "lora_alpha": 2, "target_modules": ["k_proj", "o_proj"]},
    "rank_33": {"r": 33, "lora_alpha": 20, "target_modules": ALL_LINEARS},
    "rslora": {"r": 16, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "rank_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL_LINEARS,
        "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"v_proj": 3, "model.layers.0.mlp.up_proj": 30},
    },
    "rslora_pattern": {
        "r": 4,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"o_proj": 9},
        "alpha_pattern": {"q_proj": 5},
    },
    "regex": {"r": 5, "lora_alpha": 10, "target_modules": r".*\.layers\.1\..*(q|gate)_proj"},
    "all_linear": {"r": 6, "lora_alpha": 9, "target_modules": "all-linear"},
    "some_layers": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "one_layer_of_a_pattern": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["down_proj", "k_proj"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "excluded": {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ALL_LINEARS,
        "exclude_modules": ["up_proj", "model.layers.0.self_attn.q_proj"],
    },
    "excluded_by_regex": {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": r".*layers\.0.*v_proj",
    },
    "full_names": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.gate_proj"],
    },
}


def write_lora(
    model: nn.Module,
    directory: Path,
    *,
    seed: int = 0,
    std: float = 0.3,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Path:
    """A LoRA with random weights, saved by PEFT. `std` is B's, `dtype` that of the file.

    Where it trains the base's biases, they are others than the base's.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")  # of tied, saved and biased layers
        peft = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=std if "lora_B" in name else 0.2)
                elif parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * std)
        peft.save_pretrained(directory)
    if dtype is not None:
        edit_tensors(directory, lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    return directory


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = directory / "adapter_model.safetensors"
    save_file({name: t.contiguous() for name, t in edit(load_file(path)).items()}, path)


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class Oracle:
    """The base and its adapters in PEFT, one request at a time.

    Biases that an adapter brings stay in PEFT's base for good, so such an adapter needs one by itself.
    """

    def __init__(self, model: nn.Module, directories: dict[str, Path]) -> None:
        self._base = model
        self._peft: PeftModel | None = None
        for name, directory in directories.items():
            key = name.replace("/", "_")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="peft")
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(copy.deepcopy(model), directory, adapter_name=key)
                else:
                    self._peft.load_adapter(directory, adapter_name=key)

    def model(self, adapter: str | None) -> nn.Module:
        if adapter is None or self._peft is None:
            return self._base
        self._peft.set_adapter(adapter.replace("/", "_"))
        return self._peft.eval()

    def generate(self, adapter: str | None, prompt: tuple[int, ...], max_new_tokens: int) -> list[int]:
        return generate_greedily(self.model(adapter), prompt, max_new_tokens)


def write_ia3(model: nn.Module, directory: Path, *, seed: int = 0, **options: Any) -> Path:
    """An IA³ with random scales around one, saved by PEFT."""
    torch.manual_seed(seed)
    peft = get_peft_model(copy.deepcopy(model), IA3Config(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "ia3_l" in name:
                parameter.normal_(mean=1.0, std=0.7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")  # of saved embeddings
        peft.save_pretrained(directory)
    return directory


def write_prefix(
    model: nn.Module, directory: Path, tokens: int, *, seed: int = 0, std: float = 1.5, **options: Any
) -> Path:
    """A prefix with random keys and values, saved by PEFT."""
    torch.manual_seed(seed)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **options)
    peft = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in peft.prompt_encoder.parameters():
            parameter.normal_(std=std if not config.prefix_projection else 0.5)
    peft.save_pretrained(directory)
    return directory


def write_bottleneck(
    model: nn.Module, directory: Path, *, seed: int = 0, std: float = 0.3, **options: Any
) -> Path:
    """A bottleneck adapter with random weights and biases, saved by PEFT."""
    torch.manual_seed(seed)
    peft = get_peft_model(copy.deepcopy(model), BottleneckConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "_adapter." in name:
                parameter.normal_(std=std)
    peft.save_pretrained(directory, save_embedding_layers=False)
    return directory
