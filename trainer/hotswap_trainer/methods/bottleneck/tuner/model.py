"""PEFT's tuner of bottleneck adapters: puts them into a model and takes them out again."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from hotswap_trainer.methods.bottleneck.tuner.config import BottleneckConfig
from hotswap_trainer.methods.bottleneck.tuner.layer import BottleneckLayer
from hotswap_trainer.methods.bottleneck.tuner.places import Places, find_places


class BottleneckModel(BaseTuner):
    """A model whose decoder layers are wrapped where some adapter wants it.

    Tensors of a checkpoint are named `base_model.model.LAYER.PLACE_adapter.down.weight`, where LAYER is the
    decoder layer's full name and PLACE is attention or mlp; `down.bias`, `up.weight` and `up.bias` likewise.
    """

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:  # type: ignore[override]
        if "_places" not in self.__dict__:
            self._places: dict[str, Places] = find_places(model)
        count = len(self._places)
        if peft_config.layers and peft_config.layers[-1] >= count:
            raise ValueError(f"layers: the base has layers 0 to {count - 1}; got {peft_config.layers}")

    def _check_target_module_exists(self, peft_config: BottleneckConfig, key: str) -> bool:  # type: ignore[override]
        if key not in self._places:
            return False
        return peft_config.layers is None or list(self._places).index(key) in peft_config.layers

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, BottleneckLayer):
            layer = BottleneckLayer(target, self._places[current_key])
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(
            adapter_name,
            peft_config,
            self.model.config.get_text_config().hidden_size,
            inference_mode=peft_config.inference_mode,
        )

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own expects a module with a weight

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for place in BottleneckLayer.adapter_layer_names:
            key = key.replace(f".{place}.{adapter_name}.", f".{place}.")
        return key
