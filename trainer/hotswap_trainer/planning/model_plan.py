"""The plan for a model: a simulated step of every method, what serving takes, and a recommendation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hotswap_trainer.errors import OptionError
from hotswap_trainer.planning.base import read_config
from hotswap_trainer.planning.hardware import required, smallest
from hotswap_trainer.planning.options import PlanOptions
from hotswap_trainer.planning.rule import RANKS
from hotswap_trainer.planning.units import GIB

if TYPE_CHECKING:
    from hotswap_trainer.planning.recommend import Recommendation
    from hotswap_trainer.planning.serving import Serving
    from hotswap_trainer.planning.step import Step

_CONTEXT = 4096  # of a request, where the options leave it open


@dataclass(frozen=True, slots=True)
class MethodPlan:
    """A method's step; `checkpointed`, with recomputed activations, is None where the method cannot."""

    method: str
    step: Step
    checkpointed: Step | None

    @property
    def least(self) -> Step:
        """The step that needs less."""
        steps = [self.step, *([self.checkpointed] if self.checkpointed else [])]
        return min(steps, key=lambda step: step.peak)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What a model needs. `num_parameters` are the base's own."""

    base: str
    num_parameters: int
    rank: int
    options: PlanOptions
    methods: tuple[MethodPlan, ...]
    serving: Serving
    recommendation: Recommendation

    @property
    def context(self) -> int:
        """Tokens of a request that is served."""
        return self.options.context or _CONTEXT

    def as_json(self) -> dict[str, Any]:
        """Sizes in bytes; `gpu_required` is what a card must have for the peak."""
        options, serving = self.options, self.serving
        return {
            "level": "model",
            "base": {"name": self.base, "parameters": self.num_parameters},
            "dtype": options.dtype,
            "optimizer": options.optimizer,
            "seq": options.seq,
            "batch": options.batch,
            "training": [
                {
                    "method": planned.method,
                    "trained_parameters": planned.step.num_trained,
                    "trained_percent": round(100 * planned.step.num_trained / self.num_parameters, 4),
                    "checkpoint_bytes": self.checkpoint_bytes(planned),
                    "plain": _step_json(planned.step),
                    "checkpointing": _step_json(planned.checkpointed) if planned.checkpointed else None,
                }
                for planned in self.methods
            ],
            "serving": {
                "weights": serving.weights,
                "weights_nf4": serving.weights_nf4,
                "context": self.context,
                "kv_per_request": serving.kv_per_request(self.context),
                "adapters": {
                    planned.method: {
                        "bytes": serving.adapter(planned.step.num_trained),
                        "per_gb": serving.adapters_per_gb(planned.step.num_trained),
                    }
                    for planned in self.methods
                    if planned.method != "full"
                },
            },
            "gpu": None if options.gpu is None else options.gpu / GIB,
            "recommendation": asdict(self.recommendation),
        }

    def checkpoint_bytes(self, planned: MethodPlan) -> int:
        """Of what is published: adapters in float32, a full model in the type that it computes in."""
        width = self.serving.width if planned.method == "full" else 4
        return planned.step.num_trained * width


def plan_model(base: str, options: PlanOptions, tell: Callable[[str], None] = lambda _: None) -> ModelPlan:
    """The plan for what `base` names; `tell` hears of each step that is simulated.

    Raises:
        OptionError: there is no such model, or the options do not fit it.
    """
    config = read_config(base)
    from hotswap_trainer.planning.recommend import recommend
    from hotswap_trainer.planning.serving import measure_serving
    from hotswap_trainer.planning.step import DTYPES, fake_base, simulate

    tell("reading the base")
    options = _within_positions(config, options)
    rank = options.rank or RANKS[options.complexity]
    model = fake_base(config, options.dtype)
    serving = measure_serving(config, model, DTYPES[options.dtype].itemsize)
    planned = []
    for method in options.methods:
        tell(method)
        step = simulate(config, method, options, rank=rank, checkpointing=False)
        checkpointed = None
        if method != "prefix":  # whose trainer has no checkpointing
            tell(f"{method}, gradient checkpointing")
            checkpointed = simulate(config, method, options, rank=rank, checkpointing=True)
        planned.append(MethodPlan(method, step, checkpointed))
    return ModelPlan(
        base,
        sum(p.numel() for p in model.parameters()),
        rank,
        options,
        tuple(planned),
        serving,
        recommend(planned, serving, options, rank),
    )


def _within_positions(config: Any, options: PlanOptions) -> PlanOptions:
    """The options with a context, checked against the base's positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    options = replace(options, context=options.context or min(_CONTEXT, limit))
    for name in ("seq", "context"):
        if getattr(options, name) > limit:
            raise OptionError(f"--{name}: must be at most {limit}, as the base has no more positions")
    return options


def _step_json(step: Step) -> dict[str, Any]:
    gpu = smallest(step.peak)
    names = ("weights", "constants", "gradients", "optimizer", "activations", "peak")
    return {
        **{name: getattr(step, name) for name in names},
        "gpu_required": required(step.peak),
        "hardware": gpu.name if gpu else None,
    }
