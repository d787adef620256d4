"""Where a model's decoder layers have their sub-layers, found without a list of model names.

The decoder layers are the modules with one child that has a `layer_idx` and calls transformers' attention
interface: that is the attention. The MLP is the child named `mlp`, or else the only other one with matrices.
Norms are told apart by what flows through them in one forward of one token: a child whose output is the
sub-layer's input is its input norm, a child whose input is the sub-layer's output is its output norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Place:
    """One sub-layer of a decoder layer. Both names are of the layer's children, or of the sub-layer itself.

    `reads` is the child whose input is the residual stream, `writes` the one whose output is added to it.
    """

    reads: str
    writes: str


Places = Mapping[str, Place]
"""By `attention` and `mlp`."""


def find_places(model: nn.Module) -> dict[str, Places]:
    """The places of each decoder layer, by the layer's full name, in the model's order.

    Raises:
        ValueError: this model's sub-layers cannot be told, so that it cannot be adapted.
    """
    layers = {name: module for name, module in model.named_modules() if _attentions(module)}
    expected = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    if len(layers) != expected:
        raise _unfit(
            model, f"{len(layers)} of its {expected} decoder layers call transformers' attention interface"
        )
    sublayers = {name: _sublayers(model, layer) for name, layer in layers.items()}
    kinds = {name: _kind(layer) for name, layer in layers.items()}
    examples = {kind: name for name, kind in reversed(kinds.items())}
    traces = _trace(model, {name: layers[name] for name in examples.values()})
    found = {
        kind: {place: _place(model, name, child, traces[name]) for place, child in sublayers[name].items()}
        for kind, name in examples.items()
    }
    return {name: found[kind] for name, kind in kinds.items()}


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a decoder layer's child is called with."""
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, Tensor) else None


@dataclass(frozen=True, slots=True)
class _Call:
    child: str
    input: Tensor | None
    output: Any


class _Stop(Exception):
    """Every kind of layer has been seen."""


def _attentions(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if _is_attention(child)]


def _is_attention(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return hasattr(module, "layer_idx") and "ALL_ATTENTION_FUNCTIONS" in names


def _sublayers(model: nn.Module, layer: nn.Module) -> dict[str, str]:
    attentions = _attentions(layer)
    if len(attentions) != 1:
        raise _unfit(model, f"a decoder layer has {len(attentions)} attentions: {', '.join(attentions)}")
    others = [
        name
        for name, child in layer.named_children()
        if name not in attentions and any(parameter.ndim > 1 for parameter in child.parameters())
    ]
    mlps = [name for name in others if name == "mlp"] or others
    if len(mlps) != 1:
        found = ", ".join(mlps) or "none"
        raise _unfit(model, f"a decoder layer must have one MLP beside its attention; it has {found}")
    return {"attention": attentions[0], "mlp": mlps[0]}


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    return type(layer), tuple((name, type(child)) for name, child in layer.named_children())


def _trace(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[_Call]]:
    """The calls of these layers' children in a forward of one token."""
    traces: dict[str, list[_Call]] = {}
    handles = []
    for layer_name, layer in layers.items():
        calls: list[_Call] = []

        def end(*_: Any, layer_name: str = layer_name, calls: list[_Call] = calls) -> None:
            traces[layer_name] = calls
            if len(traces) == len(layers):
                raise _Stop

        for child_name, child in layer.named_children():
            if isinstance(child, nn.Dropout):  # passes a tensor on, and may stand behind both sub-layers
                continue

            def record(
                _: Any,
                args: Any,
                kwargs: Any,
                output: Any,
                child_name: str = child_name,
                calls: list[_Call] = calls,
            ) -> None:
                first = output[0] if isinstance(output, tuple) else output
                calls.append(_Call(child_name, hidden_states(args, kwargs), first))

            handles.append(child.register_forward_hook(record, with_kwargs=True))
        handles.append(layer.register_forward_hook(end))
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        with torch.no_grad():
            model(input_ids=token, use_cache=False)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return traces


def _place(model: nn.Module, layer: str, child: str, calls: list[_Call]) -> Place:
    own = [call for call in calls if call.child == child]
    if len(own) != 1 or own[0].input is None or not isinstance(own[0].output, Tensor):
        raise _unfit(model, f"{layer}.{child} is not called once, with hidden states in and out")
    call = own[0]
    size = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
    if call.output.shape[-1] != size:
        raise _unfit(model, f"{layer}.{child} gives {call.output.shape[-1]} numbers a token, not {size}")

    def named(calls: Iterator[_Call]) -> str:
        return next((found.child for found in calls), child)

    return Place(
        reads=named(other for other in calls if other is not call and other.output is call.input),
        writes=named(other for other in calls if other is not call and other.input is call.output),
    )


def _unfit(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot take bottleneck adapters: {reason}")
