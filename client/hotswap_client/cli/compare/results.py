"""The measured comparison as one value: what the reports show and the recommendation weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hotswap_client.cli.compare.evaluate import Evaluation
from hotswap_client.cli.compare.latency import Latency
from hotswap_client.cli.compare.training import Trained


@dataclass(frozen=True, slots=True)
class MethodResult:
    """A method: its training, what it knows, and its latency by batch size, beside others and merged.

    `latency` of `full` is of a server of its own, as it is a base of its own.
    """

    trained: Trained
    evaluation: Evaluation
    latency: Mapping[int, Latency]
    merged: Mapping[int, Latency] | None = None

    @property
    def name(self) -> str:
        return self.trained.method

    @property
    def is_base(self) -> bool:
        """Whether it takes a server of its own."""
        return self.name == "full"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything measured. `facts` says of what and where, by heading, for people and as they are in JSON."""

    base: Evaluation
    base_latency: Mapping[int, Latency]
    base_bytes: int
    methods: tuple[MethodResult, ...]
    question: str
    """The first question, and its right answer."""

    answer: str
    facts: Mapping[str, str]

    def text_change(self, result: MethodResult) -> float:
        """Log-likelihood of the general text, in nats per token, over the base's; negative: forgotten."""
        return round(result.evaluation.text_logprob - self.base.text_logprob, 3)

    def knowledge_change(self, result: MethodResult) -> float:
        """Share of general knowledge answered rightly, over the base's."""
        return result.evaluation.knowledge - self.base.knowledge

    @property
    def by_accuracy(self) -> bool:
        """Whether right answers tell methods apart; where nobody has one, likelihood has to."""
        return any(result.evaluation.right for result in self.methods)

    def quality(self, evaluation: Evaluation) -> float:
        """Share of right answers or, if there are none, likelihood of a token of the right ones; 0 to 1."""
        from math import exp

        return evaluation.accuracy if self.by_accuracy else exp(evaluation.answer_logprob)


def overhead(latency: Mapping[int, Latency]) -> float:
    """The larger share over the base's time between tokens, of all batch sizes; below 0 is 0."""
    return max(0.0, *(entry.between_tokens_overhead.median for entry in latency.values()))


def as_json(comparison: Comparison, recommendation: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `report.json`. What depends on time is under `times` and `latency` alone."""
    return {
        "format": 1,
        "facts": dict(comparison.facts),
        "base": {
            "checkpoint_bytes": comparison.base_bytes,
            **_quality(comparison.base),
            "latency": _latencies(comparison.base_latency),
        },
        "methods": [_method(comparison, result) for result in comparison.methods],
        "recommendation": dict(recommendation),
    }


def _method(comparison: Comparison, result: MethodResult) -> dict[str, Any]:
    trained = result.trained
    return {
        "method": result.name,
        "adapter": f"{trained.adapter}@{trained.version}",
        "settings": dict(trained.settings),
        "trainable_parameters": trained.trainable,
        "trainable_percent": round(trained.percent, 4),
        "checkpoint_bytes": trained.checkpoint_bytes,
        "training_steps": trained.steps,
        "training_loss": {"first": trained.losses[0][1], "last": trained.losses[-1][1]},
        **_quality(result.evaluation),
        "forgetting": {
            "text_logprob_change": comparison.text_change(result),
            "knowledge_change": round(comparison.knowledge_change(result), 4),
        },
        "times": {"training_seconds": trained.seconds, "peak_memory_bytes": dict(trained.peak_memory)},
        "latency": _latencies(result.latency),
        "latency_merged": None if result.merged is None else _latencies(result.merged),
    }


def _quality(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "accuracy": round(evaluation.accuracy, 4),
        "right": evaluation.right,
        "questions": evaluation.num_questions,
        "answer_logprob": evaluation.answer_logprob,
        "text_logprob": evaluation.text_logprob,
        "knowledge_accuracy": round(evaluation.knowledge, 4),
        "knowledge_items": evaluation.num_items,
        "sample_answer": evaluation.sample,
    }


def _latencies(latencies: Mapping[int, Latency]) -> Sequence[dict[str, Any]]:
    from dataclasses import asdict

    return [asdict(latency) for latency in latencies.values()]
