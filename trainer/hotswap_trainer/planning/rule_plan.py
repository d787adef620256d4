"""The plan for a size: the rule of thumb for every method, and the lesson's recommendation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hotswap_trainer.planning import rule
from hotswap_trainer.planning.hardware import smallest
from hotswap_trainer.planning.options import PlanOptions
from hotswap_trainer.planning.units import GIB


@dataclass(frozen=True, slots=True)
class RulePlan:
    """Estimates by method; `recommendation` is None without a GPU to recommend for."""

    billions: float
    options: PlanOptions
    estimates: tuple[rule.RuleEstimate, ...]
    serving: float
    recommendation: dict[str, Any] | None

    def hardware(self, estimate: rule.RuleEstimate) -> str | None:
        """The smallest card that holds an estimate, None where it takes several."""
        gpu = smallest(estimate.total * GIB)
        return gpu.name if gpu else None

    def as_json(self) -> dict[str, Any]:
        options = self.options
        return {
            "level": "rule",
            "base": {"parameters": round(self.billions * 1e9)},
            "dtype": options.dtype,
            "optimizer": options.optimizer,
            "training": [
                {
                    **{name: _rounded(value) for name, value in asdict(estimate).items()},
                    "hardware": self.hardware(estimate),
                    **(
                        {"lesson_hardware": rule.lesson_hardware(estimate.total)}
                        if estimate.method == "full"
                        else {}
                    ),
                }
                for estimate in self.estimates
            ],
            "serving": {"weights": _rounded(self.serving)},
            "gpu": None if options.gpu is None else options.gpu / GIB,
            "recommendation": self.recommendation,
        }


def plan_by_rule(billions: float, options: PlanOptions) -> RulePlan:
    """The plan for a model of so many billion parameters, of which nothing else is known.

    Sequence, batch and the adapters' sizes are no part of the rule, so that they change nothing.
    """
    estimates = tuple(
        rule.full_memory(billions, options.dtype, options.optimizer)
        if method == "full"
        else rule.adapter_memory(method, billions)
        for method in options.methods
    )
    recommendation = None
    if options.gpu is not None:
        recommendation = rule.recommend(billions, options.gpu / GIB, options.complexity, options.tasks > 1)
    weights = rule.full_memory(billions, options.dtype, options.optimizer).weights
    return RulePlan(billions, options, estimates, weights, recommendation)


def _rounded(value: Any) -> Any:
    return round(value, 1) if isinstance(value, float) else value
