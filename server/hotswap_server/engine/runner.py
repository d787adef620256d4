"""One forward of the base over a ragged batch."""

from __future__ import annotations

from typing import Any

import torch

from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.batch import StepInputs
from hotswap_server.engine.buffers import GraphInputs
from hotswap_server.engine.graphs import DecodeGraphs
from hotswap_server.engine.kv_cache import PagedKVCache


class ModelRunner:
    """Binds a base to a cache; after that a step is a function of its inputs."""

    def __init__(self, base: BaseModel, cache: PagedKVCache, *, graphs: bool = False) -> None:
        self._base = base
        base.state.key_caches = cache.keys
        base.state.value_caches = cache.values
        self.graphs = DecodeGraphs(base.state, base.merged, self._decode, base.device) if graphs else None

    def run(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [rows, vocabulary] in float32 of `inputs.logit_rows`; keys and values go to their pages."""
        if self.graphs is not None and inputs.graph is not None:
            logits = self.graphs.run(inputs.graph)
            rows = inputs.logit_rows
            return (logits if len(rows) == len(logits) else logits[rows.to(logits.device)]).float()
        return self._forward(inputs, inputs.logit_rows).float()

    def _decode(self, inputs: GraphInputs) -> torch.Tensor:
        return self._forward(inputs, 0)  # 0 means all

    def _forward(self, inputs: StepInputs | GraphInputs, logits_to_keep: Any) -> torch.Tensor:
        base, state = self._base, self._base.state
        state.layout, state.slots = inputs.layout, inputs.slots
        state.logit_rows = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else None
        base.merged.use(inputs.merged)
        if inputs.slots and base.compiled:
            state.adapts_blocks = any(
                delta.method in inputs.slots for block in base.blocks for delta in block.deltas
            )
        try:
            output = base.model(
                input_ids=inputs.input_ids,
                position_ids=inputs.position_ids,
                use_cache=False,
                logits_to_keep=logits_to_keep,
            )
        finally:
            state.layout, state.slots, state.logit_rows, state.adapts_blocks = None, {}, None, False
        logits: torch.Tensor = output.logits[0]
        return logits
