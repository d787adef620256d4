"""Which method to take: the best within the limits and, of equally good ones, what costs least.

A cost counts as the part of the user's limit that it uses up; without a limit, of the most that any of the
compared took (or of a floor, below which differences are noise). The costs weigh alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hotswap_client.cli.compare.options import Limits
from hotswap_client.cli.compare.results import Comparison, MethodResult, overhead
from hotswap_client.cli.compare.units import bytes_of, share, signed, signed_share

# The least that a cost is divided by where there is no limit: differences below a tenth of it mean little.
_FLOORS = {"latency": 0.1, "checkpoint": 10e6, "memory": 1e9, "forgetting": 0.1}
_LIKELIHOOD_MARGIN = 0.02


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method on one path: `batched` beside others, `merged`, or on a server of its `own`."""

    method: str
    path: str
    quality: float
    latency: float
    checkpoint: float
    memory: float
    forgetting: float
    """Nats per token of general text; 0 where nothing was forgotten."""

    def costs(self) -> dict[str, float]:
        return {
            "latency": self.latency,
            "checkpoint": self.checkpoint,
            "memory": self.memory,
            "forgetting": self.forgetting,
        }


@dataclass(frozen=True, slots=True)
class Recommendation:
    """`method` is None where nothing fits. `reasons` are sentences; `excluded` says why each other is out."""

    method: str | None
    path: str | None
    reasons: tuple[str, ...]
    excluded: Mapping[str, str]
    scores: Mapping[str, float]
    """The sums of costs of those that are as good as the best; less is better."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def recommend(comparison: Comparison, limits: Limits) -> Recommendation:
    """The recommendation for these limits."""
    excluded: dict[str, str] = {}
    fitting: list[Candidate] = []
    base = comparison.quality(comparison.base)
    for result in comparison.methods:
        candidates = _candidates(comparison, result)
        broken = [_broken(candidate, limits) for candidate in candidates]
        fits = [candidate for candidate, problem in zip(candidates, broken, strict=True) if not problem]
        if candidates[0].quality <= base:
            excluded[result.name] = "is no better at the task than the base"
        elif not fits:
            excluded[result.name] = broken[0]
        else:
            fitting.append(fits[0])  # merged only where batched is too slow: one adapter at a time can be
    if not fitting:
        return Recommendation(None, None, (_nothing(comparison, limits, base),), excluded, {})
    best = max(candidate.quality for candidate in fitting)
    margin = _margin(comparison, best)
    close = [candidate for candidate in fitting if candidate.quality >= best - margin]
    for candidate in fitting:
        if candidate not in close:
            excluded[candidate.method] = (
                f"is worse at the task: {share(candidate.quality)}, not {share(best)}"
            )
    scores = _scores(close, limits)
    chosen = min(close, key=lambda candidate: (scores[candidate.method], candidate.method))
    return Recommendation(
        chosen.method,
        chosen.path,
        tuple(_reasons(comparison, chosen, close, margin, limits)),
        excluded,
        {method: round(score, 3) for method, score in scores.items()},
    )


def _candidates(comparison: Comparison, result: MethodResult) -> list[Candidate]:
    def on(path: str, latency: float) -> Candidate:
        return Candidate(
            result.name,
            path,
            quality=comparison.quality(result.evaluation),
            latency=latency,
            checkpoint=result.trained.checkpoint_bytes,
            memory=result.trained.memory,
            forgetting=max(0.0, -comparison.text_change(result)),
        )

    found = [on("own" if result.is_base else "batched", overhead(result.latency))]
    return found if result.merged is None else [*found, on("merged", overhead(result.merged))]


def _broken(candidate: Candidate, limits: Limits) -> str:
    """The limits that a candidate breaks, in words; empty if none."""
    problems = []
    if limits.latency_overhead is not None and candidate.latency > limits.latency_overhead:
        problems.append(
            f"takes {signed_share(candidate.latency)} time between tokens "
            f"(--max-latency-overhead {share(limits.latency_overhead)})"
        )
    if limits.checkpoint is not None and candidate.checkpoint > limits.checkpoint:
        size, limit = bytes_of(candidate.checkpoint), bytes_of(limits.checkpoint)
        problems.append(f"has a checkpoint of {size} (--max-checkpoint {limit})")
    if limits.memory is not None and candidate.memory > limits.memory:
        problems.append(f"trains in {bytes_of(candidate.memory)} (--memory {bytes_of(limits.memory)})")
    return " and ".join(problems)


def _margin(comparison: Comparison, best: float) -> float:
    """What the best may be ahead by chance: a standard error of its share of right answers, at least one."""
    if not comparison.by_accuracy:
        return _LIKELIHOOD_MARGIN
    count = comparison.base.num_questions
    return max(1 / count, math.sqrt(best * (1 - best) / count)) + 1e-9


def _scores(close: Sequence[Candidate], limits: Limits) -> dict[str, float]:
    given = {"latency": limits.latency_overhead, "checkpoint": limits.checkpoint, "memory": limits.memory}
    scores = {candidate.method: 0.0 for candidate in close}
    for cost, floor in _FLOORS.items():
        most = max(candidate.costs()[cost] for candidate in close)
        unit = given.get(cost) or max(most, floor)
        for candidate in close:
            scores[candidate.method] += candidate.costs()[cost] / unit
    return scores


def _reasons(
    comparison: Comparison,
    chosen: Candidate,
    close: Sequence[Candidate],
    margin: float,
    limits: Limits,
) -> list[str]:
    what = "right answers" if comparison.by_accuracy else "likelihood of a right token"
    others = [candidate.method for candidate in close if candidate is not chosen]
    change = next(comparison.text_change(r) for r in comparison.methods if r.name == chosen.method)
    reasons = [
        f"{chosen.method} reaches {share(chosen.quality)} {what}; the base has "
        f"{share(comparison.quality(comparison.base))}."
    ]
    if others:
        reasons.append(
            f"{' and '.join(others)} {'is' if len(others) == 1 else 'are'} as good within chance "
            f"({share(margin)}), but cost{'s' if len(others) == 1 else ''} more when latency, checkpoint, "
            "memory and forgetting are weighed together."
        )
    reasons.append(
        f"It takes {signed_share(chosen.latency)} time between tokens, a checkpoint of "
        f"{bytes_of(chosen.checkpoint)} and {bytes_of(chosen.memory)} to train, and changes the "
        f"log-likelihood of other text by {signed(change)} nats a token."
    )
    if chosen.path == "merged":
        reasons.append(
            "That is merged into the base: beside others it is slower than your limit, and a server merges "
            "one adapter at a time."
        )
    if chosen.path == "own":
        reasons.append("It is a base of its own and needs a server of its own; the others share one.")
    if limits == Limits():
        reasons.append(
            "No limits were given; --max-latency-overhead, --max-checkpoint and --memory set some."
        )
    return reasons


def _nothing(comparison: Comparison, limits: Limits, base: float) -> str:
    if not any(comparison.quality(result.evaluation) > base for result in comparison.methods):
        return (
            "No method is better at the task than the base: train for longer (--epochs), or on more examples."
        )
    return "No method that learnt the task keeps the limits: loosen the one that is named beside each."
