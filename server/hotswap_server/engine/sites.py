"""Modules outside the projections whose output methods change: the token embedding, and those with a bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hotswap_server.engine.attention import StepState
from hotswap_server.engine.blocks import Call

# Modules that add their bias last, so that another bias is a shift of the output.
_BIAS_LAST = (nn.Linear, nn.LayerNorm, Conv1D)


class OutputDelta(Protocol):
    """What a method makes of a module's output, in place: out [tokens, width].

    `given` is what the module got, [tokens] ids of an embedding or [tokens, features].
    """

    def __call__(self, given: torch.Tensor, out: torch.Tensor) -> None: ...


class OutputSite:
    """One such module, by its name in the base; it sees every token of a step."""

    def __init__(self, name: str, module: nn.Module, width: int, state: StepState) -> None:
        self.name = name
        self.module = module
        self.width = width
        self.deltas: list[OutputDelta] = []
        self._state = state
        # Not a hook: that takes a module's slow way to its forward on every call, needed or not.
        module.forward = partial(self._forward, module.forward)

    def detach(self) -> None:
        """Forget every adapter method."""
        self.deltas.clear()

    def _forward(self, forward: Callable[..., Any], given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = forward(given, *args, **kwargs)
        if self.deltas and self._state.slots:
            # Tokens are the last dimension of an embedding's ids, the last but one of what others get.
            tokens = given.flatten() if given.shape == out.shape[:-1] else given.view(-1, given.shape[-1])
            for delta in self.deltas:
                delta(tokens, out.view(-1, self.width))
        return out


class EmbeddingSite(OutputSite):
    """The token embedding; `scale` is the factor in its output, which Gemma's have."""

    def __init__(self, name: str, module: nn.Embedding, state: StepState) -> None:
        super().__init__(name, module, module.embedding_dim, state)
        self.scale = float(getattr(module, "embed_scale", 1.0))

    @property
    def weight(self) -> torch.Tensor:
        """[vocabulary, hidden_size]"""
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        return weight


def find_embedding(model: nn.Module, state: StepState) -> EmbeddingSite | None:
    """The token embedding, unless the model has none of the usual kind."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, nn.Embedding):
        return None
    name = next(name for name, module in model.named_modules() if module is embedding)
    return EmbeddingSite(name, embedding, state)


def find_biased(calls: Iterable[Call], grouped: Set[str], state: StepState) -> tuple[OutputSite, ...]:
    """The modules among `calls` that add a bias for each token and are in no projection group.

    `grouped` are the names of those that are in one.
    """
    found: dict[str, OutputSite] = {}
    for call in calls:
        module = call.module
        if not isinstance(module, _BIAS_LAST) or module.bias is None or call.name in grouped | set(found):
            continue
        width = module.bias.shape[0]
        # A norm of heads gives more rows than there are tokens.
        if call.given is not None and call.result.shape == (*call.given.shape[:2], width):
            found[call.name] = OutputSite(call.name, module, width, state)
    return tuple(found.values())
