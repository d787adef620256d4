"""Adapters of every method for one batch, and PEFT's answers to what such a batch is asked."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from support.adapters import Oracle, write_bottleneck, write_ia3, write_lora, write_prefix
from support.models import explain, random_prompt
from support.running import Outcome, Running

NEW_TOKENS = 24
WRITERS: dict[str, Callable[[nn.Module, Path], object]] = {
    "lora4": partial(write_lora, r=4, target_modules="all-linear"),
    "lora9": partial(write_lora, seed=1, r=9, target_modules=["q_proj", "v_proj"]),
    "dora5": partial(write_lora, seed=3, r=5, use_dora=True, target_modules=["v_proj", "o_proj", "up_proj"]),
    "embeddings": partial(write_lora, seed=3, r=3, target_modules=["embed_tokens", "lm_head", "up_proj"]),
    "houlsby": partial(write_bottleneck, bottleneck_size=8),
    "parallel": partial(
        write_bottleneck, seed=1, bottleneck_size=21, layout="parallel", activation="silu", after_mlp=False
    ),
    "prefix7": partial(write_prefix, tokens=7),
    "prefix33": partial(write_prefix, tokens=33, seed=1),
    "ia3": partial(
        write_ia3, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    # One more of each than there are slots in the tests of eviction.
    "lora2": partial(write_lora, seed=2, r=2, target_modules=["o_proj", "gate_proj"]),
    "pfeiffer": partial(write_bottleneck, seed=2, bottleneck_size=5, layout="pfeiffer", residual=False),
    "prefix20": partial(write_prefix, tokens=20, seed=2),
}
TOGETHER = [
    None,
    "lora4",
    "lora9",
    "dora5",
    "embeddings",
    "houlsby",
    "parallel",
    "prefix7",
    "prefix33",
    "ia3",
]


def write_store(model: nn.Module, store: Path) -> Path:
    for name, write in WRITERS.items():
        write(model, store / "acme" / name / "1")
    return store


def make_oracles(model: nn.Module, store: Path, kind: type[Oracle] = Oracle) -> dict[str | None, Oracle]:
    made = {name: kind(model, {f"acme/{name}": store / "acme" / name / "1"}) for name in WRITERS}
    return {None: kind(model, {}), **made}


def full_name(name: str | None) -> str | None:
    return None if name is None else f"acme/{name}"


def assert_equal(
    oracles: dict[str | None, Oracle], name: str | None, outcome: Outcome, count: int = NEW_TOKENS
) -> None:
    oracle, prompt = oracles[name], outcome.request.prompt_ids
    expected = oracle.generate(full_name(name), prompt, count)
    got = outcome.result().tokens
    assert got == expected, f"{name}: " + explain(oracle.model(full_name(name)), prompt, expected, got)


def load(running: Running, names: list[str | None]) -> None:
    for name in names:
        if name is not None:
            running.adapters.load(f"acme/{name}", None).result()


def start(running: Running, name: str | None, length: int, seed: int) -> tuple[str | None, Outcome]:
    prompt = random_prompt(length, seed=seed)
    return name, running.generate(prompt, full_name(name), max_new_tokens=NEW_TOKENS)


def arrive_under_pressure(
    running: Running, order: int
) -> tuple[list[Outcome], list[tuple[str | None, Outcome]]]:
    """Requests for all adapters, each coming a step after the last, beside eight of the base.

    `running` wants so few pages and slots that requests are preempted and adapters evicted; `order` mixes
    the adapters. Gives the base's outcomes, and the others with their adapter's name.
    """
    names = [None, *WRITERS] * 2
    requests = [(names[i * order % len(names)], 1 + 9 * i % 100, i) for i in range(len(names))]
    assert {name for name, _, _ in requests} == {None, *WRITERS}
    # Of the base, so that memory alone decides who is preempted, however slowly adapters are loaded.
    plain = [running.generate(random_prompt(20, seed=100 + i), max_new_tokens=NEW_TOKENS) for i in range(8)]
    arrivals = [
        partial(
            running.generate, random_prompt(length, seed=seed), full_name(name), max_new_tokens=NEW_TOKENS
        )
        for name, length, seed in requests
    ]
    outcomes = running.arrive(arrivals, every=1)
    for outcome in plain:
        outcome.result()
    assert running.engine.stats().preemptions > 0
    for method in ("lora", "bottleneck", "prefix"):
        evicted = [ref for kind, ref in running.recorder.adapter_events if kind == "evicted"]
        assert method in {ref.method for ref in evicted}
    assert max(step.distinct_adapters for step in running.recorder.steps) > 1
    return plain, [(name, outcome) for (name, _, _), outcome in zip(requests, outcomes, strict=True)]


PRESSURE = {"kv_pages": 150, "page_size": 2, "slots": 2, "max_batch_tokens": 40}
