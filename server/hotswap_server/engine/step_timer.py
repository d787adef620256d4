"""Times one decode step of made-up sequences through the engine's own batch, runner and sampler."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from hotswap_server.core import AdapterRef, Event, GenerateRequest, SamplingParams
from hotswap_server.engine.batch import BatchBuilder
from hotswap_server.engine.kv_cache import PagedKVCache
from hotswap_server.engine.prefixes import Prefix, PrefixPages
from hotswap_server.engine.runner import ModelRunner
from hotswap_server.engine.sampler import SamplingRow, sample
from hotswap_server.engine.scheduler import Scheduled
from hotswap_server.engine.sequence import Sequence

_SAMPLING = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
_TOKEN = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a step: its adapter in its slot, or the base."""

    adapter: AdapterRef | None = None
    slot: int | None = None
    merged: bool = False


class StepTimer:
    """For the engine's thread, between two steps. Whatever a step takes is given back at its end."""

    def __init__(
        self,
        builder: BatchBuilder,
        runner: ModelRunner,
        cache: PagedKVCache,
        prefixes: PrefixPages,
        *,
        max_context: int,
        device: torch.device,
    ) -> None:
        self._builder = builder
        self._runner = runner
        self._cache = cache
        self._prefixes = prefixes
        self._max_context = max_context
        self._device = device
        self._numbers = itertools.count()

    def time(self, rows: Items[Row], *, context: int) -> float | None:
        """Seconds of a step that decodes one token of each row after `context` tokens, prefixes not counted.

        None if the cache has no room for that now.
        """
        with torch.inference_mode():
            own: list[Prefix] = []  # that nobody else had in pages
            sequences: list[Sequence] = []
            try:
                for row in rows:
                    sequence = self._sequence(row, context, own)
                    if sequence is None:
                        return None
                    sequences.append(sequence)
                self._clear(sequences)
                return self._step(sequences)
            finally:
                for sequence in sequences:
                    self._cache.pages.release(sequence.pages)
                for prefix in own:
                    self._prefixes.drop(prefix)

    def _step(self, sequences: list[Sequence]) -> float:
        self._wait()
        started = time.perf_counter()
        inputs = self._builder.build([Scheduled(sequence, 1) for sequence in sequences])
        logits = self._runner.run(inputs)
        sample(logits, [SamplingRow(s.sampling, s.seed, s.num_generated, s.token_ids) for s in sequences])
        self._wait()
        return time.perf_counter() - started

    def _sequence(self, row: Row, context: int, own: list[Prefix]) -> Sequence | None:
        prefix = None
        if row.adapter is not None and row.slot is not None and not row.merged:
            prefix = self._prefixes.placed(row.adapter.method, row.slot)
        length = 0 if prefix is None else prefix.num_tokens
        context = min(context, self._max_context - length - 1)
        if context < 1:
            return None
        request = GenerateRequest(
            f"step-timer-{next(self._numbers)}", (_TOKEN,) * context, _SAMPLING, row.adapter
        )
        sequence = Sequence(request, _nobody, max_new_tokens=1)
        sequence.slot, sequence.merged, sequence.prefix = row.slot, row.merged, prefix
        sequence.num_computed = context - 1
        shared, missing = length // self._cache.page_size, 0
        if prefix is not None:
            missing = self._prefixes.num_missing(prefix)
        needed = self._cache.pages_for(length + context) - shared
        if needed + missing > self._cache.pages.num_free:
            return None
        if prefix is not None:
            if missing:
                own.append(prefix)
            sequence.pages = self._prefixes.share(prefix)
        sequence.pages += self._cache.pages.allocate(needed) or []
        if prefix is not None:
            self._prefixes.write_rest(prefix, sequence.pages[shared])
        return sequence

    def _clear(self, sequences: list[Sequence]) -> None:
        """Zero the keys and values that the step reads, which may be what memory happened to hold."""
        page_size = self._cache.page_size
        pages = [
            page
            for sequence in sequences
            for page in sequence.pages[-(-sequence.num_prefix_tokens // page_size) :]
        ]
        index = torch.tensor(pages, dtype=torch.long, device=self._device)
        for layer in (*self._cache.keys, *self._cache.values):
            layer.index_fill_(0, index, 0)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _nobody(event: Event) -> None: ...
