"""A made-up comparison, for tests of what reports show and recommend."""

from pathlib import Path
from typing import Any

from hotswap_client.cli.compare.evaluate import Evaluation
from hotswap_client.cli.compare.latency import Latency, Overhead, Percentiles
from hotswap_client.cli.compare.options import PRESETS
from hotswap_client.cli.compare.results import Comparison, MethodResult
from hotswap_client.cli.compare.training import Trained

QUESTIONS = 50
ITEMS = 20


def evaluation(right: int, *, text: float = -3.0, knowledge: int = 12, answer: float = -1.0) -> Evaluation:
    return Evaluation(right, QUESTIONS, answer, text, knowledge, ITEMS, f"an answer <of> {right} | parts")


def latencies(over: float = 0.0, *, path: str = "batched") -> dict[int, Latency]:
    def at(size: int) -> Latency:
        step = 0.02 * size**0.5 * (1 + over)
        return Latency(
            batch_size=size,
            first_token=Percentiles(5 * step, 8 * step),
            between_tokens=Percentiles(step, 1.5 * step),
            tokens_per_second=size / step,
            first_token_overhead=Overhead(over, over - 0.02, over + 0.02),
            between_tokens_overhead=Overhead(over, over - 0.02, over + 0.02),
            path=path,
        )

    return {size: at(size) for size in (1, 8)}


def method(
    name: str,
    *,
    right: int = 40,
    over: float = 0.1,
    merged: float | None = None,
    megabytes: float = 10,
    gigabytes: float = 2.0,
    **known: Any,
) -> MethodResult:
    trained = Trained(
        method=name,
        adapter=f"compare/{name}-0123456789ab",
        version=1,
        path=Path("store"),
        settings={"method": name, "seed": "0", "epochs": "2.0", **PRESETS[name]},
        trainable=1_000_000,
        percent=0.74,
        steps=90,
        seconds=100.0,
        peak_memory={"host": round(gigabytes * 1e9)},
        checkpoint_bytes=round(megabytes * 1e6),
        losses=((1, 3.0), (45, 0.5), (90, 0.05)),
        versions={"python": "3.11.7", "torch": "2.13.0"},
    )
    in_the_weights = None if merged is None else latencies(merged, path="merged")
    return MethodResult(trained, evaluation(right, **known), latencies(over), in_the_weights)


def comparison(*methods: MethodResult, base: Evaluation | None = None) -> Comparison:
    return Comparison(
        base=base or evaluation(0),
        base_latency=latencies(path="base"),
        base_bytes=538_000_000,
        methods=methods,
        question="Order: two <teas>, please.\nKitchen slip:",
        answer="\n2 x tea",
        facts={"base": "smollm2 & more", "machine": "2 cores"},
    )


def all_methods() -> Comparison:
    """Every method, with figures such as SmolLM2's."""
    return comparison(
        method("lora", right=46, over=0.19, merged=0.01, megabytes=19.6, gigabytes=1.9, text=-3.12),
        method("qlora", right=45, over=0.18, megabytes=19.6, gigabytes=1.6, text=-3.2),
        method("bottleneck", right=47, over=0.12, megabytes=18, gigabytes=1.85, text=-3.3, knowledge=11),
        method("prefix", right=18, over=0.02, megabytes=0.92, gigabytes=1.8, text=-3.4, knowledge=10),
        method("ia3", right=31, over=0.05, megabytes=0.3, gigabytes=1.84, text=-3.02),
        method("full", right=44, over=0.0, megabytes=538, gigabytes=3.4, text=-3.6, knowledge=9),
    )
