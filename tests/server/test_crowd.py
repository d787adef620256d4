"""Many adapters of all methods behind few slots: every answer is the one that the adapter gives alone."""

import random
from collections import Counter
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hotswap_server.metrics import Metrics
from safetensors.torch import load_file, save_file
from support.adapters import write_bottleneck, write_ia3, write_lora, write_prefix
from support.models import random_prompt
from support.running import Outcome, Running, wait_until

METHODS = ("lora", "bottleneck", "prefix", "ia3")
SLOTS = 2  # of each method: 8 in all
PROMPT = random_prompt(6, seed=0)


def register(llama, store: Path, count: int, scratch: Path) -> list[str]:
    """`count` adapters of all methods, each with its own weights."""
    targets = ["q_proj", "v_proj", "down_proj"]
    sources = {
        "lora": write_lora(llama, scratch / "lora", r=2, lora_alpha=4, target_modules=targets),
        "bottleneck": write_bottleneck(llama, scratch / "bottleneck", bottleneck_size=4),
        "prefix": write_prefix(llama, scratch / "prefix", 5),
        "ia3": write_ia3(llama, scratch / "ia3", target_modules=["v_proj"], feedforward_modules=[]),
    }
    tensors = {method: load_file(path / "adapter_model.safetensors") for method, path in sources.items()}
    names = []
    for index in range(count):
        method = METHODS[index % len(METHODS)]
        name = f"tenant-{index % 7}/task-{index}"
        directory = store / name / "1"
        directory.mkdir(parents=True)
        config = (sources[method] / "adapter_config.json").read_bytes()
        (directory / "adapter_config.json").write_bytes(config)
        generator = torch.Generator().manual_seed(index)
        own = {
            key: tensor * (1 + 0.7 * torch.randn(tensor.shape, generator=generator))
            for key, tensor in tensors[method].items()
        }
        save_file(own, directory / "adapter_model.safetensors")
        names.append(name)
    return names


def zipf(names: list[str], count: int, *, exponent: float) -> list[str]:
    """`count` draws, the first of a random order the most likely."""
    rng = random.Random(0)
    order = rng.sample(names, len(names))
    weights = list(accumulate(1 / rank**exponent for rank in range(1, len(names) + 1)))
    return rng.choices(order, cum_weights=weights, k=count)


@pytest.mark.parametrize(
    ("num_adapters", "num_requests", "host_bytes"),
    [(40, 50, 60_000), pytest.param(1000, 500, 400_000, marks=pytest.mark.slow)],
)
def test_every_answer_is_the_adapter_s_own(
    llama, llama_base, tokenizer, tmp_path, num_adapters, num_requests, host_bytes
):
    store = tmp_path / "store"
    names = register(llama, store, num_adapters, tmp_path / "scratch")
    wanted = zipf(names, num_requests, exponent=1.0)
    host = {"host_cache_bytes": host_bytes}  # for a third of them, or less
    with Running(llama_base, tokenizer, store, slots=SLOTS, manager=host) as running:
        alone = {name: running.generate(PROMPT, name).result().tokens for name in sorted(set(wanted))}
    assert len({tuple(tokens) for tokens in alone.values()}) > 0.9 * len(alone), "a mix-up must show"

    metrics = Metrics()
    with Running(
        llama_base, tokenizer, store, slots=SLOTS, manager=host, max_batch_size=16, observer=metrics
    ) as running:
        outcomes: list[Outcome] = []
        for name in wanted:
            outcomes.append(running.generate(PROMPT, name))
            wait_until(lambda: sum(not outcome.ended for outcome in outcomes) < 48)
        wrong = [
            name
            for name, outcome in zip(wanted, outcomes, strict=True)
            if outcome.result().tokens != alone[name]
        ]
        stats = running.adapters.host_stats()
        assert wrong == []
        assert stats.bytes <= stats.budget_bytes
        assert stats.adapters < 0.7 * len(alone)
        assert running.adapters._cache.stats.leased_bytes == 0
        assert all(taken == SLOTS for taken, _ in running.adapters.slot_counts().values())
        assert len(running.adapters._placement.residents) == SLOTS * len(METHODS)
        waits = [outcome.finished.timings.load for outcome in outcomes]
        measured = sum(
            sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name == "hotswap_load_seconds_sum"
        )
    assert sum(waits) == pytest.approx(measured, rel=1e-6)
    assert sum(wait > 0 for wait in waits) > len(alone) / 2
    methods = Counter(outcome.request.adapter.method for outcome in outcomes)
    assert set(methods) == set(METHODS)
