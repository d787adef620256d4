"""The other side: transformers' `generate` over a static batch, and PEFT's mixed batch of adapters."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import torch

from hotswap_server.bench.workload import Case, Run


class StaticBatchSide:
    """`generate` on all prompts at once; with adapters through PEFT's `adapter_names`."""

    def __init__(self, model: Any, store: Path) -> None:
        # Both sides go on after an end-of-sequence token, so that all runs are of one length.
        model.generation_config.eos_token_id = None
        self._model = model
        self._store = store
        self._wrapped: Any = None

    def prepare(self, case: Case) -> None:
        from peft import PeftModel

        if self._wrapped is not None:
            self._model = self._wrapped.unload()
            self._wrapped = None
        for name in sorted({case.adapter_of(request) for request in range(case.requests)} - {None}):  # type: ignore[type-var]
            path = self._store / str(name)
            if self._wrapped is None:
                self._wrapped = PeftModel.from_pretrained(self._model, path, adapter_name=_key(name))
            else:
                self._wrapped.load_adapter(path, adapter_name=_key(name))
        if self._wrapped is not None:
            self._wrapped.eval()

    def run(self, case: Case, prompts: list[list[int]], new_tokens: int) -> Run:
        ids = torch.tensor(prompts)
        clock = _StepClock()
        options: dict[str, Any] = {}
        if case.adapters:
            options["adapter_names"] = [_key(case.adapter_of(request)) for request in range(case.requests)]
        model = self._model if self._wrapped is None else self._wrapped
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                stopping_criteria=[clock],
                **options,
            )
        seconds = time.perf_counter() - started
        gaps = [b - a for a, b in itertools.pairwise(clock.times)]
        return Run(
            seconds=seconds,
            ttft=[clock.times[0] - started] * len(prompts),
            inter_token=gaps * len(prompts),
            tokens=out[:, ids.shape[1] :].tolist(),
        )


class _StepClock:
    """A stopping criterion that stops nothing and notes when it was asked."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _key(name: str | None) -> str:
    """PEFT's adapter names become module names, where no dot or slash may be."""
    return str(name).replace("/", "_")
