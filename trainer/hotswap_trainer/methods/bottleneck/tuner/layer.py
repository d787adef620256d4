"""A decoder layer with bottleneck adapters, and the adapter itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hotswap_trainer.methods.bottleneck.tuner.config import BottleneckConfig
from hotswap_trainer.methods.bottleneck.tuner.places import Places, hidden_states

_STD = 1e-2
_OTHER_NAMES = {"leakyrelu": "leaky_relu"}  # AdapterHub's to transformers'


class Bottleneck(nn.Module):
    """f(z) = scaling * up(activation(down(z))) for z `[…, hidden]`.

    Starts near zero as in Houlsby et al. (section 3.6 there): weights from a normal distribution of deviation
    0.01 truncated at two deviations, biases zero. The adapted model starts near the base.
    """

    def __init__(self, config: BottleneckConfig, hidden_size: int) -> None:
        super().__init__()
        size = config.size(hidden_size)
        self.config = config
        self.down = nn.Linear(hidden_size, size)
        self.up = nn.Linear(size, hidden_size)
        self.activation = ACT2FN[_OTHER_NAMES.get(config.activation, config.activation)]
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=_STD, a=-2 * _STD, b=2 * _STD)
            nn.init.zeros_(linear.bias)

    def forward(self, z: Tensor) -> Tensor:
        return self.config.scaling * self.up(self.activation(self.down(z)))  # type: ignore[no-any-return]


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """Wraps a decoder layer. Hooks on its children read the residual stream and adapt the outputs.

    Of several active adapters, each reads the unadapted output, and what they add is summed.
    """

    adapter_layer_names = ("attention_adapter", "mlp_adapter")

    def __init__(self, base_layer: nn.Module, places: Places) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.attention_adapter = nn.ModuleDict()
        self.mlp_adapter = nn.ModuleDict()
        self._streams: dict[str, Tensor] = {}
        self._handles = []
        for name, place in places.items():
            reader, writer = base_layer.get_submodule(place.reads), base_layer.get_submodule(place.writes)
            self._handles += [
                reader.register_forward_pre_hook(partial(self._read, name), with_kwargs=True),
                writer.register_forward_hook(partial(self._write, name)),
            ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Models ask their layers for such things as `attention_type`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(
        self,
        adapter_name: str,
        config: BottleneckConfig,
        hidden_size: int,
        *,
        inference_mode: bool = False,
    ) -> None:
        """Give the layer an adapter's modules, of the device and floating type of the base's weights."""
        weight = next(weight for weight in self.base_layer.parameters() if weight.is_floating_point())
        for place in config.places:
            adapter = Bottleneck(config, hidden_size)
            if next(adapter.parameters()).device.type != "meta":  # PEFT's low_cpu_mem_usage
                adapter.to(weight.device, weight.dtype)
            self._adapters(place)[adapter_name] = adapter
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("a bottleneck adapter is not linear, so it cannot be merged into the base's weights")

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The decoder layer as it was."""
        if merge:
            self.merge(safe_merge, adapter_names)
        for handle in self._handles:
            handle.remove()
        return self.base_layer

    def _adapters(self, place: str) -> nn.ModuleDict:
        return getattr(self, f"{place}_adapter")  # type: ignore[no-any-return]

    def _active(self, place: str) -> list[Bottleneck]:
        if self.disable_adapters:
            return []
        adapters = self._adapters(place)
        return [adapters[name] for name in self.active_adapters if name in adapters]  # type: ignore[misc]

    def _read(self, place: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = hidden_states(args, kwargs)
        if stream is not None and any(a.config.layout != "houlsby" for a in self._active(place)):
            self._streams[place] = stream

    def _write(self, place: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        stream = self._streams.pop(place, None)
        adapters = self._active(place)
        if not adapters:
            return output
        if isinstance(output, tuple):
            return (self._adapted(adapters, output[0], stream), *output[1:])
        return self._adapted(adapters, output, stream)

    def _adapted(self, adapters: list[Bottleneck], x: Tensor, stream: Tensor | None) -> Tensor:
        result = x if all(adapter.config.residual for adapter in adapters) else torch.zeros_like(x)
        for adapter in adapters:
            z = x
            if adapter.config.layout != "houlsby":
                if stream is None:
                    raise RuntimeError(
                        "the residual stream did not pass where it did when the model was read"
                    )
                z = stream if adapter.config.layout == "parallel" else x + stream
            result = result + adapter(self._cast_input_dtype(z, adapter.down.weight.dtype)).to(x.dtype)
        return result
