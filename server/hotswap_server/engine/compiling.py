"""`torch.compile` of the decoder layers: what is between projections and attention becomes a few kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hotswap_server.engine.base import BaseModel

# Code objects that all layers share are compiled for one token and for many, with blocks adapted or not, and
# for every kind of layer (sliding or full attention).
_MAX_VARIANTS = 64


def cache_directory() -> Path:
    """Where compiled code is kept between starts; TORCHINDUCTOR_CACHE_DIR overrides it."""
    import platformdirs

    own = os.environ.get("HOTSWAP_CACHE_DIR") or platformdirs.user_cache_dir("hotswap")
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(own) / "inductor")


def compile_layers(
    base: BaseModel, *, backend: Any = "inductor", options: dict[str, Any] | None = None
) -> None:
    """Compile the layers of `base`, each when it is first called.

    All layers share the compiled code, since they are alike but for their tensors; adapters are behind
    operations that it does not look into, so they never make it stale.
    """
    if base.state.compiled or base.biased:
        return  # adapters may change modules inside the layers, such as norms with a bias
    base.state.compiled = True
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory()))
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_VARIANTS)
    for group in base.groups:
        group.hide()
    for block in base.blocks:
        block.hide()
    for module in base.model.modules():
        if hasattr(module, "hotswap_hidden"):
            module.hotswap_hidden = True  # type: ignore[assignment]
    for layer in base.layers:
        layer.forward = _marked(torch.compile(layer.forward, backend=backend, options=options))
    for module in _beside(base):
        module.forward = _marked(torch.compile(module.forward, backend=backend, options=options))


def compile_no_more() -> None:
    """Run what is compiled as it is, and all else as it was written."""
    torch.compiler.set_stance("eager_on_recompile")


def _beside(base: BaseModel) -> list[nn.Module]:
    """The norms of the decoder that are in no layer."""
    inside = {module for layer in base.layers for module in layer.modules()}
    return [
        module
        for module in base.model.modules()
        if type(module).__name__.endswith("Norm") and module not in inside and not list(module.children())
    ]


def _marked(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with the number of tokens said to vary, or the first would be compiled for itself alone."""

    def call(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.shape[1] > 1:
            for tensor in (hidden_states, *_tensors(kwargs.values())):
                if tensor.ndim > 1 and tensor.shape[1] == hidden_states.shape[1]:
                    torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return forward(hidden_states, *args, **kwargs)

    return call


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple):
            found += _tensors(value)
    return found
