"""One forward of the base over a ragged batch."""

from __future__ import annotations

from typing import Any

import torch

from hotswap_server.engine.ahead import Choice, NextTokens
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.batch import StepInputs
from hotswap_server.engine.buffers import GraphInputs, StepBuffers
from hotswap_server.engine.graphs import StepGraphs
from hotswap_server.engine.kv_cache import PagedKVCache


class ModelRunner:
    """Binds a base to a cache; after that a step is a function of its inputs."""

    def __init__(
        self,
        base: BaseModel,
        cache: PagedKVCache,
        *,
        max_sequences: int,
        buffers: StepBuffers | None = None,
    ) -> None:
        """With `buffers` steps are recorded, over the inputs that are filled into these."""
        self._base = base
        self._next = NextTokens(max_sequences, base.device, None if buffers is None else buffers.chosen)
        base.state.key_caches = cache.keys
        base.state.value_caches = cache.values
        self.graphs: StepGraphs | None = None
        if buffers is not None:
            self.graphs = StepGraphs(base.state, base.merged, self._recorded, base.device)

    def run(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [rows, vocabulary] in float32 of `inputs.logit_rows`; keys and values go to their pages."""
        if self.graphs is not None and inputs.graph is not None:
            logits = self.graphs.run(inputs.graph)
            rows = inputs.logit_rows
            return (logits if len(rows) == len(logits) else logits[rows.to(logits.device)]).float()
        ids = inputs.input_ids
        if inputs.chosen:
            both = torch.tensor([*inputs.chosen.items()]).to(ids.device, non_blocking=True)
            ids[0, both[:, 0]] = self._next.tokens[both[:, 1]]
        return self._forward(inputs, ids, inputs.logit_rows).float()

    def choose(self, inputs: StepInputs) -> Choice:
        """As `run`, for the likeliest token of each row alone; does not wait for it.

        `inputs.chosen_at` are the rows of what it gives, which a step built before the next call may name.
        """
        if self.graphs is not None and inputs.graph is not None:
            return self._next.fetch(len(self.graphs.run(inputs.graph)))
        logits = self.run(inputs)
        self._next.choose(logits)
        return self._next.fetch(len(logits))

    def _recorded(self, inputs: GraphInputs) -> torch.Tensor:
        ids = inputs.flat.index_select(0, inputs.sources)[None]
        logits = self._forward(inputs, ids, 0 if inputs.logit_rows is None else inputs.logit_rows)  # 0: all
        self._next.choose(logits)
        return logits

    def _forward(
        self, inputs: StepInputs | GraphInputs, input_ids: torch.Tensor, logits_to_keep: Any
    ) -> torch.Tensor:
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
                input_ids=input_ids,
                position_ids=inputs.position_ids,
                use_cache=False,
                logits_to_keep=logits_to_keep,
            )
        finally:
            state.layout, state.slots, state.logit_rows, state.adapts_blocks = None, {}, None, False
            state.pending.clear()
        logits: torch.Tensor = output.logits[0]
        return logits
