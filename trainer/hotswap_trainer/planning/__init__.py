"""`hotswap plan`: what training and serving need, before anything is trained.

`plan` is the whole of it as a function. A size (`7b`) gets the rule of thumb of `rule.py`, which needs no
library; everything else is a model, of which `step.py` runs a training step without memory or arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hotswap_trainer.planning.options import PlanOptions
from hotswap_trainer.planning.rule_plan import RulePlan, plan_by_rule
from hotswap_trainer.planning.units import parse_size

if TYPE_CHECKING:
    from hotswap_trainer.planning.model_plan import ModelPlan

__all__ = ["ModelPlan", "PlanOptions", "RulePlan", "plan"]


def plan(
    base: str, options: PlanOptions | None = None, *, tell: Callable[[str], None] = lambda _: None
) -> RulePlan | ModelPlan:
    """What each method needs to train `base` and to serve it, and which one to take.

    `base` is a size such as `7b`, a transformers directory, a hub id, `smollm2`, or a shape such as
    `llama-8b`. Of a model only the configuration is read. `tell` hears what is being simulated, which takes
    seconds.

    Raises:
        OptionError: names the option and the remedy.
    """
    options = options or PlanOptions()
    billions = parse_size(base)
    if billions is not None:
        return plan_by_rule(billions, options)
    from hotswap_trainer.planning.model_plan import plan_model

    return plan_model(base, options, tell)
