"""`hotswap bench --mix`: what each adapter method costs beside the base, and all of them in one batch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hotswap.layout import CONFIG_FILE, WEIGHTS_FILE
from safetensors.torch import save_file

from hotswap_server.adapters import synthetic
from hotswap_server.adapters.synthetic import BOTTLENECK_SIZE, PREFIX_TOKENS, Content
from hotswap_server.bench.ours import EngineSide
from hotswap_server.bench.workload import ALL_LINEAR, QUERY_VALUE, Run, Shape, make_prompts, percentiles
from hotswap_server.engine.base import BaseModel


@dataclass(frozen=True, slots=True)
class MixCase:
    """`requests` sent at once; request i uses `names[i mod len(names)]`, None being the base.

    With `merged` the first of `names` is in the base's weights meanwhile.
    """

    name: str
    requests: int
    names: tuple[str | None, ...]
    merged: bool = False

    def adapter_of(self, request: int) -> str | None:
        return self.names[request % len(self.names)]


def write_mix(base: BaseModel, store: Path, *, requests: int, adapters: int, rank: int) -> list[MixCase]:
    """Random adapters of every method in `store`, and the cases that use them: the base alone, each method
    with `adapters` distinct ones, one LoRA or bottleneck for all, that LoRA merged, and all in turn."""
    every_linear, bottleneck = f"LoRA r={rank} on all linears", f"bottleneck-{BOTTLENECK_SIZE}"
    kinds: dict[str, tuple[str, Callable[[], Content]]] = {
        f"LoRA r={rank} on q,v": ("lora-qv", lambda: synthetic.lora(base, rank, QUERY_VALUE)),
        every_linear: ("lora-all", lambda: synthetic.lora(base, rank, ALL_LINEAR)),
        bottleneck: ("bottleneck", lambda: synthetic.bottleneck(base, BOTTLENECK_SIZE)),
        f"prefix-{PREFIX_TOKENS}": ("prefix", lambda: synthetic.prefix(base, PREFIX_TOKENS)),
        "IA³ on k,v,down": ("ia3", lambda: synthetic.ia3(base)),
    }
    cases = [MixCase("base", requests, (None,))]
    for title, (name, make) in kinds.items():
        names = tuple(f"mix/{name}-{index}" for index in range(min(adapters, requests)))
        for adapter in names:
            save_adapter(store / adapter, *make())
        cases.append(MixCase(title, requests, names))
        if title in (every_linear, bottleneck):
            cases.append(MixCase(f"{title}, one for all", requests, names[:1]))
        if title == every_linear:
            cases.append(MixCase(f"{title}, merged", requests, names[:1], merged=True))
    one_each = tuple(dict.fromkeys(case.names[0] for case in cases))
    cases.append(MixCase("all of them", requests, one_each))
    return cases


def measure_mix(
    side: EngineSide, cases: list[MixCase], shape: Shape, vocab_size: int, *, repeat: int, seed: int
) -> list[dict[str, Any]]:
    """Run all cases in every one of `repeat` rounds; the figures of each, the base's first.

    The base runs before and after every other case, and a round's ratio is that of the mean of these two to
    the case, so that a machine which slows down over seconds does so for both. A run counts as the median
    time between two tokens. `step_ms` is the median of a case's runs, `decode_throughput` the tokens per
    second that follow from it, `of_base_rounds` has the ratio of each round and `of_base` their median.
    """

    def step_seconds(case: MixCase, new_tokens: int) -> float:
        prompts = make_prompts(case.requests, shape.prompt_tokens, vocab_size, seed)
        side.prepare(case)
        side.merge(case.names[0] if case.merged else None)
        return _step_seconds(side.run(case, prompts, new_tokens))

    plain, *others = cases
    base_steps: list[float] = []
    steps: dict[str, list[float]] = {case.name: [] for case in others}
    ratios: dict[str, list[float]] = {case.name: [] for case in others}
    for case in cases:  # warms up
        step_seconds(case, min(4, shape.new_tokens))
    for _ in range(repeat):
        before = step_seconds(plain, shape.new_tokens)
        base_steps.append(before)
        for case in others:
            own = step_seconds(case, shape.new_tokens)
            after = step_seconds(plain, shape.new_tokens)
            steps[case.name].append(own)
            ratios[case.name].append((before + after) / 2 / own)
            base_steps.append(after)
            before = after
    figures = [_figures(plain, base_steps, [1.0] * repeat)]
    return figures + [_figures(case, steps[case.name], ratios[case.name]) for case in others]


def _figures(case: MixCase, steps: list[float], ratios: list[float]) -> dict[str, Any]:
    step = statistics.median(steps)
    return {
        "case": case.name,
        "requests": case.requests,
        "adapters": len({*case.names, None}) - 1,
        "step_ms": step * 1e3,
        "decode_throughput": case.requests / step,
        "of_base": statistics.median(ratios),
        "of_base_rounds": ratios,
    }


def print_mix(
    console: Any, figures: list[dict[str, Any]], *, kernels: str, threads: int, shape: Shape
) -> None:
    from rich.table import Table

    table = Table(
        title=f"Decoding {figures[0]['requests']} requests, {shape.prompt_tokens} prompt and "
        f"{shape.new_tokens} new tokens each, {kernels} kernels, {threads} threads; median of the rounds"
    )
    table.add_column("case")
    for heading in ("adapters", "ms/step", "tok/s", "of base", "rounds"):
        table.add_column(heading, justify="right")
    for entry in figures:
        table.add_row(
            entry["case"],
            str(entry["adapters"]),
            f"{entry['step_ms']:.1f}",
            f"{entry['decode_throughput']:.1f}",
            f"{entry['of_base']:.1%}",
            f"{min(entry['of_base_rounds']):.0%} to {max(entry['of_base_rounds']):.0%}",
        )
    console.print(table)


def _step_seconds(run: Run) -> float:
    return percentiles(run.inter_token)[0]


def save_adapter(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write an adapter in PEFT's format."""
    directory.mkdir(parents=True)
    (directory / CONFIG_FILE).write_text(json.dumps({"task_type": "CAUSAL_LM", **config}))
    save_file(tensors, directory / WEIGHTS_FILE)
