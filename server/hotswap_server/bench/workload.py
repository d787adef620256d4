"""What is measured: requests of one shape over a number of adapters."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

QUERY_VALUE = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Requests(Protocol):
    """How many are sent at once, and the adapter of each."""

    @property
    def requests(self) -> int: ...

    def adapter_of(self, request: int) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Case:
    """`requests` prompts sent at once; request i uses adapter i mod `adapters`; 0 adapters is the base."""

    name: str
    requests: int
    adapters: int
    targets: tuple[str, ...] = ()

    def adapter_of(self, request: int) -> str | None:
        return adapter_name(self.targets, request % self.adapters) if self.adapters else None


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens of every prompt, tokens generated for it, and the rank of its LoRA."""

    prompt_tokens: int = 64
    new_tokens: int = 64
    rank: int = 16


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one case. Times in seconds; `tokens` are the generated ids of each request."""

    seconds: float
    ttft: list[float]
    inter_token: list[float]
    tokens: list[list[int]]

    @property
    def throughput(self) -> float:
        """Generated tokens per second."""
        return sum(map(len, self.tokens)) / self.seconds


Round = list[tuple[Run, Run]]
"""One run of every case: the engine's and the other side's."""


def default_cases(adapters: int, requests: int) -> list[Case]:
    return [
        Case(f"base, {requests // 2} requests", requests // 2, 0),
        Case(f"base, {requests} requests", requests, 0),
        Case(f"LoRA on q,v, {requests} requests over {adapters} adapters", requests, adapters, QUERY_VALUE),
        Case(
            f"LoRA on all linears, {requests} requests over {adapters} adapters",
            requests,
            adapters,
            ALL_LINEAR,
        ),
    ]


def make_prompts(requests: int, tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random ids: what they say does not change what they cost."""
    source = random.Random(seed)
    return [[source.randrange(10, vocab_size) for _ in range(tokens)] for _ in range(requests)]


def adapter_name(targets: tuple[str, ...], index: int) -> str:
    return f"bench/lora{len(targets)}-{index}"


def write_adapters(model: Any, store: Path, cases: list[Case], rank: int) -> None:
    """Random LoRAs of all cases in PEFT's format; `model` is a transformers causal LM and stays as it was."""
    from peft import LoraConfig, get_peft_model

    for case in cases:
        for index in range(case.adapters):
            config = LoraConfig(r=rank, target_modules=list(case.targets), init_lora_weights=False)
            wrapped = get_peft_model(model, config)
            wrapped.save_pretrained(str(store / adapter_name(case.targets, index)))
            wrapped.unload()


def percentiles(values: list[float]) -> tuple[float, float]:
    """The 50th and 95th percentile."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (float("nan"), float("nan"))
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]
