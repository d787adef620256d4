"""The decoder's sub-layers: where a method changes what is about to join the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from hotswap_server.engine.attention import StepState

ATTENTION, MLP = "attention", "mlp"


class BlockDelta(Protocol):
    """What a method makes of a sub-layer's output `x`, in place, and of the residual stream; both
    [tokens, hidden_size]."""

    def __call__(self, x: torch.Tensor, stream: torch.Tensor) -> None: ...


class Block:
    """One sub-layer of a decoder layer: `place` is ATTENTION or MLP, `layer` the layer's module name.

    Its output is what the model adds to the residual stream, so it is taken after an output norm where there
    is one; the stream is taken before the input norm.
    """

    def __init__(self, layer: str, place: str, hidden_size: int, state: StepState) -> None:
        self.layer = layer
        self.place = place
        self.hidden_size = hidden_size
        self.deltas: list[BlockDelta] = []
        self._state = state
        self._stream: torch.Tensor | None = None

    def attach(self, reader: nn.Module, writer: nn.Module) -> None:
        """Stand around `reader`, whose input is the stream, and `writer`, whose output is added to it."""
        # Not hooks: those take a module's slow way to its forward on every call, needed or not.
        reader.forward = partial(self._read, reader.forward)
        writer.forward = partial(self._write, writer.forward)

    def detach(self) -> None:
        """Forget every adapter method."""
        self.deltas.clear()

    def _read(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._stream = hidden_states(args, kwargs) if self.deltas and self._state.slots else None
        return forward(*args, **kwargs)

    def _write(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if self._stream is not None:
            x = _first(output).view(-1, self.hidden_size)
            stream = self._stream.view(-1, self.hidden_size)
            self._stream = None
            for delta in self.deltas:
                delta(x, stream)
        return output


@dataclass(frozen=True, slots=True)
class Call:
    """One module's call in the trace. `given` is the hidden states that it got."""

    name: str
    module: nn.Module
    given: torch.Tensor | None
    result: Any


class BlocksNotFoundError(Exception):
    """The sub-layers of a model cannot be told apart; the message says why."""


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that a decoder layer's child is called with."""
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, torch.Tensor) else None


def find_blocks(
    model: nn.Module, attentions: Iterable[nn.Module], calls: Sequence[Call], state: StepState
) -> tuple[Block, ...]:
    """The blocks of every decoder layer, in order, standing in the model.

    `attentions` are the modules that called the attention interface: the layers are their parents. The MLP is
    the layer's child of that name, or else its only other one with matrices. A child that gave the sub-layer
    its input is its input norm, one that got its output is its output norm.

    Raises:
        BlocksNotFoundError: this model's layers are built in another way.
    """
    names = {module: name for name, module in model.named_modules()}
    found: list[tuple[Block, nn.Module, nn.Module]] = []
    for attention in attentions:
        layer_name = names[attention].rpartition(".")[0]
        layer = model.get_submodule(layer_name)
        mlp = _mlp(layer, layer_name, attention)
        children = {child for child in layer.children() if not isinstance(child, nn.Dropout)}
        inside = [call for call in calls if call.module in children]
        for place, child in ((ATTENTION, attention), (MLP, mlp)):
            own = [call for call in inside if call.module is child]
            if len(own) != 1 or own[0].given is None or not isinstance(_first(own[0].result), torch.Tensor):
                raise BlocksNotFoundError(f"{names[child]} is not called once, with hidden states in and out")
            given, result = own[0].given, _first(own[0].result)
            if result.shape != given.shape:
                raise BlocksNotFoundError(f"{names[child]} gives another size than it gets")
            others = [call for call in inside if call is not own[0]]
            reader = next((call.module for call in others if _first(call.result) is given), child)
            writer = next((call.module for call in others if call.given is result), child)
            found.append((Block(layer_name, place, result.shape[-1], state), reader, writer))
    for block, reader, writer in found:
        block.attach(reader, writer)
    return tuple(block for block, _, _ in found)


def _mlp(layer: nn.Module, layer_name: str, attention: nn.Module) -> nn.Module:
    others = {
        name: child
        for name, child in layer.named_children()
        if child is not attention and any(parameter.ndim > 1 for parameter in child.parameters())
    }
    if "mlp" in others:
        return others["mlp"]
    if len(others) != 1:
        raise BlocksNotFoundError(
            f"{layer_name} must have one MLP beside its attention; it has {', '.join(others) or 'none'}"
        )
    return next(iter(others.values()))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
