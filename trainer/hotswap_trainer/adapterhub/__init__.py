"""AdapterHub's bottleneck checkpoints as ours: `double_seq_bn`, `seq_bn` and `par_bn` on Llama-like bases.

AdapterHub's adapters (https://docs.adapterhub.ml) compute what ours do as long as its many switches stand as
these three have them; whatever would compute something else is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hotswap.layout import WEIGHTS_FILE, publish

from hotswap_trainer.adapterhub.files import WEIGHTS, check_head, read_tensors
from hotswap_trainer.adapterhub.options import CONFIG, Settings, read_settings
from hotswap_trainer.errors import CheckpointError

if TYPE_CHECKING:
    from hotswap.names import AdapterName
    from torch import Tensor

    from hotswap_trainer.methods.bottleneck.tuner import BottleneckConfig

_FUSION = "adapter_fusion_config.json"
_PLACES = {"attention_adapters": "attention", "output_adapters": "mlp"}
_HALVES = {"adapter_down.0": "down", "adapter_up": "up"}
_PREFIX = "base_model.model.model.layers"

Key = tuple[int, str, str]
"""Layer, place and part of a tensor, such as 3, mlp and down.weight."""


@dataclass(frozen=True, slots=True)
class Converted:
    """An adapter in our form: PEFT's configuration, and its tensors by their names in a PEFT checkpoint."""

    config: BottleneckConfig
    tensors: dict[str, Tensor]

    def write(self, directory: Path) -> None:
        """Write a PEFT directory."""
        from safetensors.torch import save_file

        self.config.save_pretrained(str(directory))
        save_file(self.tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def import_adapter(
    directory: Path,
    name: AdapterName,
    store: Path | str,
    *,
    base: Path | None = None,
    label: str | None = None,
) -> int:
    """Convert a directory that AdapterHub wrote and publish it as the next version of `name`.

    `base` and `label` are those of `convert`.

    Raises:
        CheckpointError: the checkpoint means something that we do not compute, or is broken.
        PublishError, StorageError, OSError: the store cannot be written.
    """
    return publish(store, name, convert(directory, base=base, label=label).write)


def convert(directory: Path, *, base: Path | None = None, label: str | None = None) -> Converted:
    """Read a directory that AdapterHub's `save_adapter` wrote.

    `base` is the directory of the base, with which sizes and a saved output layer are compared; `label` is
    what the configuration calls the base, by default what AdapterHub called it.

    Raises:
        CheckpointError: as for `import_adapter`.
    """
    settings = read_settings(directory)
    if (directory / _FUSION).exists():
        raise CheckpointError(f"{_FUSION}: a fusion of adapters is not supported; save one adapter alone")
    check_head(directory, base)
    tensors = _by_key(read_tensors(directory, WEIGHTS), settings.name)
    size, layers = _check(tensors, settings, base)
    return Converted(
        _config(settings, size, layers, label or settings.model_name),
        {f"{_PREFIX}.{layer}.{place}_adapter.{part}": t for (layer, place, part), t in tensors.items()},
    )


def _by_key(found: Mapping[str, Tensor], name: str) -> dict[Key, Tensor]:
    places, halves = "|".join(_PLACES), "|".join(map(re.escape, _HALVES))
    pattern = re.compile(
        rf"(?:model\.)?layers\.(\d+)\.({places})\.adapters\.{re.escape(name)}\.({halves})\.(weight|bias)"
    )
    tensors: dict[Key, Tensor] = {}
    for key, tensor in found.items():
        match = pattern.fullmatch(key)
        if match is None:
            raise CheckpointError(f"tensor {key}: is no part of a bottleneck of the adapter {name!r}")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise CheckpointError(f"tensor {key}: holds NaN or infinity, or whole numbers")
        layer, place, half, kind = match.groups()
        tensors[int(layer), _PLACES[place], f"{_HALVES[half]}.{kind}"] = tensor.contiguous()
    if not tensors:
        raise CheckpointError("the checkpoint holds no tensors")
    return tensors


def _check(
    tensors: Mapping[Key, Tensor], settings: Settings, base: Path | None
) -> tuple[int, list[int] | None]:
    """The width of the bottlenecks and the layers that have them (None: all), if everything fits together."""
    left_out = set(settings.options["leave_out"])
    layers = {layer for layer, _, _ in tensors}
    count = max(layers | left_out) + 1
    if base is not None:
        config = json.loads((base / "config.json").read_text("utf-8"))
        if config.get("hidden_size") != settings.hidden_size:
            raise CheckpointError(
                f"{CONFIG}: hidden_size {settings.hidden_size} is not the base's, {config.get('hidden_size')}"
            )
        count = config["num_hidden_layers"]
    if layers != set(range(count)) - left_out:
        raise CheckpointError(
            f"the tensors are of layers {sorted(layers)}, which are not those of a base of {count} layers "
            f"without leave_out {sorted(left_out)}"
        )
    sizes = {tensor.shape[0] for (_, _, part), tensor in tensors.items() if part == "down.bias"}
    if len(sizes) != 1:
        raise CheckpointError(f"the bottlenecks must all be of one width; they are of {sorted(sizes)}")
    (size,), hidden = sizes, settings.hidden_size
    parts = {
        "down.weight": (size, hidden),
        "down.bias": (size,),
        "up.weight": (hidden, size),
        "up.bias": (hidden,),
    }
    wanted = {
        (layer, place, part): shape
        for layer in layers
        for place in settings.places
        for part, shape in parts.items()
    }
    for key in wanted.keys() | tensors.keys():
        found, shape = tensors.get(key), wanted.get(key)
        if found is None or shape is None or tuple(found.shape) != shape:
            has = "missing" if found is None else "not of a place that is adapted" if shape is None else (
                f"{list(found.shape)} and must be {list(shape)}")  # fmt: skip
            raise CheckpointError(f"tensor {key[2]} of layer {key[0]}, {key[1]}: is {has}")
    return size, sorted(layers) if left_out else None


def _config(settings: Settings, size: int, layers: list[int] | None, label: str) -> BottleneckConfig:
    from hotswap_trainer.methods.bottleneck.tuner import BottleneckConfig

    options, places = settings.options, settings.places
    try:
        return BottleneckConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=label or None,
            inference_mode=True,
            bottleneck_size=size,
            activation=str(options["non_linearity"]).lower(),
            after_attention="attention" in places,
            after_mlp="mlp" in places,
            layout=settings.layout,
            scaling=float(options["scaling"]),
            layers=layers,
        )
    except ValueError as error:
        raise CheckpointError(f"{CONFIG}: {str(error).replace('activation', 'non_linearity')}") from error
