"""One forward of the base over a ragged batch."""

from __future__ import annotations

import torch

from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.batch import StepInputs
from hotswap_server.engine.kv_cache import PagedKVCache


class ModelRunner:
    """Binds a base to a cache; after that a step is a function of its inputs."""

    def __init__(self, base: BaseModel, cache: PagedKVCache) -> None:
        self._base = base
        base.state.key_caches = cache.keys
        base.state.value_caches = cache.values

    def run(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [rows, vocabulary] in float32 of `inputs.logit_rows`; keys and values go to their pages."""
        state = self._base.state
        state.layout, state.slots, state.logit_rows = inputs.layout, inputs.slots, inputs.logit_rows
        self._base.merged.use(inputs.merged)
        try:
            output = self._base.model(
                input_ids=inputs.input_ids,
                position_ids=inputs.position_ids,
                use_cache=False,
                logits_to_keep=inputs.logit_rows,
            )
        finally:
            state.layout, state.slots, state.logit_rows = None, {}, None
        logits: torch.Tensor = output.logits[0]
        return logits.float()
