"""The decoder's sub-layers: where a method changes what is about to join the residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from hotswap_server.engine.attention import StepState
from hotswap_server.engine.hidden import adapt_block, hide
from hotswap_server.kernels import PendingExpand

ATTENTION, MLP = "attention", "mlp"


class BlockDelta(Protocol):
    """What a method makes of a sub-layer's output `x`, in place, and of the residual stream; both
    [tokens, hidden_size]. `method` is the name of the method."""

    method: str

    def __call__(self, x: torch.Tensor, stream: torch.Tensor) -> None: ...


class Block:
    """One sub-layer of a decoder layer: `place` is ATTENTION or MLP, `layer` the layer's module name.

    Its output is what the model adds to the residual stream, so it is taken after an output norm where there
    is one; the stream is taken before the input norm. `source` is the name of the module whose output that
    is, untouched; empty where there is none.
    """

    def __init__(self, layer: str, place: str, hidden_size: int, state: StepState, source: str = "") -> None:
        self.layer = layer
        self.place = place
        self.hidden_size = hidden_size
        self.source = source
        self.deltas: list[BlockDelta] = []
        self.handle: torch.Tensor | None = None  # where the compiler is not to look inside
        self._state = state
        self._stream: torch.Tensor | None = None

    def attach(self, reader: nn.Module, writer: nn.Module) -> None:
        """Stand around `reader`, whose input is the stream, and `writer`, whose output is added to it."""
        _watch(reader).reads = self
        _watch(writer).writes = self

    def detach(self) -> None:
        """Forget every adapter method."""
        self.deltas.clear()

    def leave(self, pending: PendingExpand) -> bool:
        """Let `adapt` add what the output of `source` lacks; False if it is not called in this step."""
        # An adapter that comes to another thread's bank while a step runs is met in the next one.
        called = self._stream is not None if self.handle is None else self._state.adapts_blocks
        if called:
            self._state.pending[self] = pending
        return called

    def take_pending(self) -> PendingExpand | None:
        """What `x` of `adapt` lacks, for whoever adds it now; None if it lacks nothing, or no more."""
        return self._state.pending.pop(self, None)

    def adapt(self, x: torch.Tensor, stream: torch.Tensor) -> None:
        """Make of the block's output `x`, in place, what the adapters make of it; both [..., hidden_size]."""
        x, stream = x.view(-1, self.hidden_size), stream.reshape(-1, self.hidden_size)
        for delta in self.deltas:
            delta(x, stream)
        if (pending := self.take_pending()) is not None:
            self._state.kernels.expand(pending, x)

    def hide(self) -> None:
        """Keep the compiler out of `adapt`; whether it is called follows the state's `adapts_blocks`."""
        self.handle = hide(self)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the stream that the reader is called with, if an adapter may need it."""
        state = self._state
        wanted = bool(self.deltas and state.slots) if self.handle is None else state.adapts_blocks
        self._stream = hidden_states(args, kwargs) if wanted else None

    def write(self, output: Any) -> Any:
        """What becomes of the writer's output."""
        stream, self._stream = self._stream, None
        if stream is None:
            return output
        if self.handle is None:
            self.adapt(_first(output), stream)
        else:
            adapt_block(_first(output), stream, self.handle)
        return output


class _Watch:
    """The blocks that a module stands at the beginning or the end of."""

    def __init__(self) -> None:
        self.reads: Block | None = None
        self.writes: Block | None = None


_watched_kinds: dict[type[nn.Module], type[nn.Module]] = {}


def _watch(module: nn.Module) -> _Watch:
    if not hasattr(module, "hotswap_watch"):
        module.hotswap_watch = _Watch()  # type: ignore[assignment]
        kind = type(module)
        if kind not in _watched_kinds:
            _watched_kinds[kind] = _watched(kind)
        module.__class__ = _watched_kinds[kind]
    watch: _Watch = module.hotswap_watch  # type: ignore[assignment]
    return watch


def _watched(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with blocks around its forward.

    Not hooks: those take a module's slow way to its forward on every call, needed or not. Not a forward of
    the module's own: a compiler would take every one for another function.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch: _Watch = self.hotswap_watch  # type: ignore[assignment]
        if watch.reads is not None:
            watch.reads.read(args, kwargs)
        output = kind.forward(self, *args, **kwargs)
        return output if watch.writes is None else watch.writes.write(output)

    return type(kind.__name__, (kind,), {"forward": forward})


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
            block = Block(layer_name, place, result.shape[-1], state, _source(calls, child, writer, result))
            found.append((block, reader, writer))
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


def _source(calls: Sequence[Call], child: nn.Module, writer: nn.Module, result: torch.Tensor) -> str:
    """The innermost module that made `result`; empty if a norm comes after it, or it was changed in place."""
    if writer is not child or result._version:
        return ""
    return next(call.name for call in calls if _first(call.result) is result)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
