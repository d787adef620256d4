"""The engine's entry in transformers' attention interface, and the state a step's forward reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from hotswap_server.engine.hidden import attend, hide
from hotswap_server.errors import BaseModelError
from hotswap_server.kernels import AttentionLayout, Kernels, PendingExpand, TokenSlots

ATTENTION_NAME = "hotswap_paged"
TRACE_NAME = "hotswap_trace"

OTHERS = "others-of-merged"
"""Key in a step's slots of the rows that do not use the merged adapter: slot 0; the others -1."""

# Keyword arguments that leave the result of attention alone, or that the paged form honours.
_KNOWN = frozenset(
    {
        "dropout",
        "scaling",
        "sliding_window",
        "softcap",
        "is_causal",
        "position_ids",
        "position_embeddings",
        "use_cache",
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    }
)


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """The shape of one attention call, in the order the decoder makes them."""

    layer: int
    heads: int
    kv_heads: int
    head_dim: int


class StepState:
    """What the hooks of a forward read. The runner fills it before each step; one per engine."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.layout: AttentionLayout | None = None
        self.key_caches: list[torch.Tensor] = []
        self.value_caches: list[torch.Tensor] = []
        self.slots: dict[str, TokenSlots] = {}
        self.logit_rows: torch.Tensor | None = None
        self.pending: dict[object, PendingExpand] = {}  # by the block whose output lacks it
        self.compiled = False
        self.adapts_blocks = False  # read by compiled layers and their blocks alone
        self._touches: dict[tuple[str, int], int] = {}
        self._sets: list[frozenset[object]] = []
        self._unions: dict[frozenset[int], int] = {}
        self._lock = threading.Lock()

    def slots_of(self, method: str, touched: Set[int], *, at_logits: bool = False) -> TokenSlots | None:
        """The slots of `method`, if the step has tokens of one of `touched`, which are those that matter.

        `at_logits`: of the rows that the output embedding sees, not of all tokens.
        """
        slots = self.slots.get(method)
        if slots is None or slots.used.isdisjoint(touched):
            return None
        return slots.at(self.logit_rows) if at_logits and self.logit_rows is not None else slots

    def mark(self, method: str, slot: int, touches: Set[object]) -> None:
        """Tell what of the base the adapter in `slot` touches: where a forward does not leave it out."""
        self._touches[method, slot] = self._numbered(frozenset(touches))

    def path(self, method: str, used: Set[int]) -> int | None:
        """A number for what a forward does with `used` slots of `method`; None if it does nothing.

        Two sets of slots that touch the same places have the same number, and run the same operations.
        """
        numbers = frozenset(self._touches[method, slot] for slot in used if (method, slot) in self._touches)
        if not numbers:
            return None
        found = self._unions.get(numbers)
        if found is None:
            found = self._numbered(frozenset().union(*(self._sets[number] for number in numbers)))
            self._unions[numbers] = found
        return found

    def _numbered(self, touches: frozenset[object]) -> int:
        with self._lock:
            if touches not in self._sets:
                self._sets.append(touches)
            return self._sets.index(touches)


class LayerAttention:
    """The attention of one layer over its part of the cache."""

    def __init__(self, layer: int, state: StepState) -> None:
        self._layer = layer
        self._state = state
        self.handle = hide(self)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, head_dim], out
        [1, tokens, heads, head_dim]."""
        state, layout = self._state, self._state.layout
        if layout is None:
            raise RuntimeError("a paged forward needs the runner's step state")
        keys, values = state.key_caches[self._layer], state.value_caches[self._layer]
        state.kernels.write_cache(key[0].transpose(0, 1), value[0].transpose(0, 1), keys, values, layout)
        return state.kernels.paged_attention(
            query[0].transpose(0, 1), keys, values, layout, scale=scale, window=window, softcap=softcap
        )[None]


_trace_sites: dict[nn.Module, AttentionSite] | None = None


@contextmanager
def trace_into() -> Iterator[dict[nn.Module, AttentionSite]]:
    """Collect the attention calls of a forward made with `TRACE_NAME`, by the module that makes them."""
    global _trace_sites
    sites: dict[nn.Module, AttentionSite] = {}
    _trace_sites = sites
    try:
        yield sites
    finally:
        _trace_sites = None


def _trace_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    unknown = {name for name, given in kwargs.items() if given is not None} - _KNOWN
    if unknown:
        raise BaseModelError(
            f"base: its attention uses {', '.join(sorted(unknown))}, which paged attention does not implement"
        )
    if value.shape != key.shape:
        raise BaseModelError("base: keys and values of different head sizes are not supported")
    if _trace_sites is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer != len(_trace_sites):
            raise BaseModelError("base: layers that share a key-value cache are not supported")
        _trace_sites[module] = AttentionSite(layer, query.shape[1], key.shape[1], key.shape[3])
    return query.new_zeros(query.shape).transpose(1, 2), None


def _paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, head_dim]; see transformers."""
    layer: LayerAttention = module.hotswap_attention  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if module.hotswap_hidden:
        return attend(query, key, value, layer.handle, scale, sliding_window, softcap), None
    return layer.attend(query, key, value, scale, sliding_window, softcap), None


AttentionInterface.register(ATTENTION_NAME, _paged_attention)
AttentionInterface.register(TRACE_NAME, _trace_attention)
