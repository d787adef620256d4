"""The engine's side of a measurement: in process, from a real store, as `hotswap serve` runs it."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.merges import Merges
from hotswap_server.adapters.method import BankOptions
from hotswap_server.bench.workload import Requests, Run
from hotswap_server.core import Delta, Event, Failed, GenerateRequest, SamplingParams
from hotswap_server.engine.base import BaseModel
from hotswap_server.engine.engine import Engine, EngineOptions

_Timed = queue.SimpleQueue[tuple[int, float, Event]]


class EngineSide:
    """Runs cases on one engine that stays up between them, its adapters loaded."""

    name = "hotswap"

    def __init__(
        self,
        base: BaseModel,
        tokenizer: Any,
        store: Path,
        slots: int,
        rank: int,
        options: EngineOptions | None = None,
    ) -> None:
        self._manager = AdapterManager(
            AdapterManager.open_store(str(store)), base, BankOptions(num_slots=slots, max_lora_rank=rank)
        )
        self._engine = Engine(base, tokenizer, self._manager, options)
        self._merges = Merges(self._manager, base, self._engine.between_steps)
        self._manager.on_change = self._engine.wake
        self._engine.record_graphs()
        self._engine.start()
        self._sent = 0

    def close(self) -> None:
        self._engine.stop()
        self._merges.close()
        self._manager.close()

    def prepare(self, case: Requests) -> None:
        """Load the case's adapters, so that a run measures decoding and not the disk."""
        for name in {case.adapter_of(request) for request in range(case.requests)} - {None}:
            self._manager.load(name, None).result()  # type: ignore[arg-type]

    def merge(self, name: str | None) -> None:
        """Have this adapter, or none, in the base's weights from now on."""
        if name is not None:
            self._merges.merge(self._manager.resolve(name, None)).result()
        elif (merged := self._merges.merged) is not None:
            self._merges.unmerge(merged.name).result()

    def wait_for_each_step(self) -> None:
        """Launch no step ahead from now on."""
        self._engine.run_ahead(False)

    def first_token(self, name: str | None, prompt: list[int]) -> float:
        """Seconds until a request has its first token; until its end nothing else is asked."""
        ref = None if name is None else self._manager.resolve(name, None)
        self._sent += 1
        sampling = SamplingParams(max_new_tokens=2, temperature=0.0, ignore_eos=True)
        events: _Timed = queue.SimpleQueue()
        request = GenerateRequest(f"bench-{self._sent}", tuple(prompt), sampling, ref)
        started = time.perf_counter()
        self._engine.submit(request, partial(_note, events, 0))
        _, at, event = events.get()
        while isinstance(event, Delta):
            event = events.get()[2]
        if isinstance(event, Failed):
            raise event.error
        return at - started

    @contextmanager
    def decoding(self, prompts: list[list[int]], new_tokens: int) -> Iterator[None]:
        """Have these prompts decoded by the base meanwhile, all past their prompts at the beginning."""
        sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        events: _Timed = queue.SimpleQueue()
        names = [f"bench-beside-{self._sent}-{index}" for index in range(len(prompts))]
        for index, prompt in enumerate(prompts):
            self._engine.submit(
                GenerateRequest(names[index], tuple(prompt), sampling), partial(_note, events, index)
            )
        begun: set[int] = set()
        while len(begun) < len(prompts):
            begun.add(events.get()[0])
        try:
            yield
        finally:
            for name in names:
                self._engine.cancel(name)

    def run(self, case: Requests, prompts: list[list[int]], new_tokens: int) -> Run:
        refs = [
            None if (name := case.adapter_of(request)) is None else self._manager.resolve(name, None)
            for request in range(case.requests)
        ]
        sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        events: _Timed = queue.SimpleQueue()
        started = time.perf_counter()
        for index, (prompt, ref) in enumerate(zip(prompts, refs, strict=True)):
            self._sent += 1
            request = GenerateRequest(f"bench-{self._sent}", tuple(prompt), sampling, ref)
            self._engine.submit(request, partial(_note, events, index))
        tokens: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        left = len(prompts)
        while left:
            index, at, event = events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Delta):
                tokens[index].extend(event.token_ids)
                times[index].append(at)
            else:
                left -= 1
        return Run(
            seconds=time.perf_counter() - started,
            ttft=[at[0] - started for at in times],
            inter_token=[b - a for at in times for a, b in itertools.pairwise(at)],
            tokens=tokens,
        )


def _note(events: _Timed, index: int, event: Event) -> None:
    events.put((index, time.perf_counter(), event))
