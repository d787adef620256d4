"""Which method to take, from what each one needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotswap_trainer.planning.hardware import required, smallest
from hotswap_trainer.planning.options import PlanOptions
from hotswap_trainer.planning.units import show_bytes

if TYPE_CHECKING:
    from hotswap_trainer.planning.model_plan import MethodPlan
    from hotswap_trainer.planning.serving import Serving

# By preference. Full fine-tuning moves everything, which one hard task may need and no other repays; a
# prefix says least and weighs least.
_PREFERENCE = {
    "simple": ("lora", "bottleneck", "qlora", "prefix", "full"),
    "moderate": ("lora", "bottleneck", "qlora", "prefix", "full"),
    "complex": ("full", "lora", "qlora", "bottleneck", "prefix"),
}


@dataclass(frozen=True, slots=True)
class Recommendation:
    """`method` is None where none fits; `flags` are `hotswap train`'s, `gpu` is the card that it is for."""

    method: str | None
    flags: str
    gpu: str
    reason: str


def recommend(
    planned: Sequence[MethodPlan], serving: Serving, options: PlanOptions, rank: int
) -> Recommendation:
    """The first method of the task's order that fits, without checkpointing if that is enough.

    A full model is no adapter: it is left out for several tasks. So is, for simple tasks, LoRA whose adapters
    would not lie in the GPU's memory all at once beside the base, if those of a prefix would. Without a GPU
    each method has the card that it needs, so preference alone decides.
    """
    methods = {plan.method: plan for plan in planned}
    order = [name for name in _PREFERENCE[options.complexity] if name in methods]
    if options.tasks > 1:
        order = [name for name in order if name != "full"]
    if not order:
        return Recommendation(
            None, "", _card(options, None), "A full model serves one task; plan a method with adapters."
        )
    fitting = [name for name in order if _fits(methods[name].least.peak, options)]
    if not fitting:
        least = min((methods[name] for name in order), key=lambda plan: plan.least.peak)
        need = required(least.least.peak)
        gpu = smallest(least.least.peak)
        return Recommendation(
            None,
            "",
            _card(options, None),
            f"No method fits. {least.method} needs least, {show_bytes(need)}"
            f"{f' ({gpu.name})' if gpu else ''}; lower --batch or --seq, or take a smaller base.",
        )
    chosen, why = fitting[0], _reason(fitting[0], order, options)
    lighter = _lighter(chosen, fitting, methods, serving, options)
    if lighter is not None:
        chosen, why = lighter
    plan = methods[chosen]
    checkpointing = not _fits(plan.step.peak, options)
    if checkpointing:
        why += " It takes gradient checkpointing."
    return Recommendation(chosen, _flags(chosen, options, rank, checkpointing), _card(options, plan), why)


def _reason(chosen: str, order: Sequence[str], options: PlanOptions) -> str:
    passed_over = order[: order.index(chosen)]
    if passed_over:
        return f"{' and '.join(passed_over)} would not fit, {chosen} does."
    if chosen == "full":
        return "One complex task, and all parameters fit: nothing limits what is learnt."
    kind = (
        f"{options.tasks} tasks share one base" if options.tasks > 1 else f"For a {options.complexity} task"
    )
    return (
        f"{kind}: {chosen} fits, changes any layer, and can be merged at no cost."
        if (chosen == "lora")
        else f"{kind}: {chosen} fits."
    )


def _lighter(
    chosen: str,
    fitting: Sequence[str],
    methods: dict[str, MethodPlan],
    serving: Serving,
    options: PlanOptions,
) -> tuple[str, str] | None:
    """A prefix in place of adapters too heavy to lie in a GPU's memory together."""
    if options.gpu is None or options.complexity != "simple" or "prefix" not in fitting or options.tasks == 1:
        return None

    def total(name: str) -> int:
        return options.tasks * serving.adapter(methods[name].step.num_trained)

    weights = serving.weights_nf4 if chosen == "qlora" else serving.weights
    room = options.gpu - required(weights) - serving.kv_per_request(options.context or 0)
    if not total("prefix") <= room < total(chosen):
        return None
    return (
        "prefix",
        f"{options.tasks} adapters of {chosen} take {show_bytes(total(chosen))}, more than the GPU has "
        f"beside the base; prefixes take {show_bytes(total('prefix'))}, and the tasks are simple.",
    )


def _fits(peak: int, options: PlanOptions) -> bool:
    return options.gpu is None or required(peak) <= options.gpu


def _flags(method: str, options: PlanOptions, rank: int, checkpointing: bool) -> str:
    own = {
        "lora": f" --rank {rank} --target-modules {options.target_modules}",
        "qlora": f" --rank {rank} --target-modules {options.target_modules}",
        "bottleneck": f" --bottleneck-size {options.bottleneck_size}",
        "prefix": f" --num-virtual-tokens {options.num_virtual_tokens}",
    }.get(method, "")
    end = " --gradient-checkpointing" if checkpointing else ""
    return f"--method {method}{own} --max-length {options.seq} --batch-size {options.batch}{end}"


def _card(options: PlanOptions, plan: MethodPlan | None) -> str:
    if options.gpu is not None:
        return show_bytes(options.gpu)
    gpu = smallest(plan.step.peak) if plan else None
    return gpu.name if gpu else "several GPUs"
