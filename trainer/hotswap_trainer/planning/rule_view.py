"""The rule of thumb as tables for a terminal of 80 columns."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hotswap_trainer.planning.rule import RuleEstimate
from hotswap_trainer.planning.rule_plan import RulePlan
from hotswap_trainer.planning.units import GIB


def show(plan: RulePlan, console: Console) -> None:
    options = plan.options
    console.print(
        f"[bold]{plan.billions:g}B parameters[/], the rule of thumb: "
        f"{options.dtype}, {options.optimizer} [dim](full fine-tuning's)[/]\n"
    )
    console.print(_training(plan))
    console.print(
        Text(
            "Sequences, batches and ranks are no part of the rule: they count where --base is a "
            "model, as llama-8b or a directory.",
            "dim",
        )
    )
    console.print(f"\nServing: {plan.serving:.1f} GB of weights, and keys and values by the model.")
    console.print(_recommendation(plan))


def _training(plan: RulePlan) -> Table:
    table = Table(
        title="Training memory, GB", title_justify="left", title_style="bold", box=None, padding=(0, 1)
    )
    table.add_column("method", style="cyan", no_wrap=True)
    for name in ("weights", "gradients", "optimizer", "activations", "unnamed", "total"):
        table.add_column(name, justify="right", no_wrap=True, style="bold" if name == "total" else "")
    table.add_column("fits", no_wrap=True)
    for estimate in plan.estimates:
        table.add_row(
            estimate.method,
            *(
                _gb(getattr(estimate, name))
                for name in ("weights", "gradients", "optimizer", "activations", "unnamed")
            ),
            f"{estimate.total:.1f}",
            _fits(plan, estimate),
        )
    return table


def _fits(plan: RulePlan, estimate: RuleEstimate) -> str:
    if plan.options.gpu is not None:
        return "[green]yes[/]" if estimate.total * GIB <= plan.options.gpu else "[red]no[/]"
    return plan.hardware(estimate) or "several GPUs"


def _gb(value: float) -> str:
    return f"{value:.1f}" if value else "-"


def _recommendation(plan: RulePlan) -> RenderableType:
    found = plan.recommendation
    if found is None:
        return Text("Give --gpu 24GB for a recommendation.", "dim")
    details = [f"{name} {found[name]}" for name in ("rank", "bottleneck") if name in found]
    head = Text.assemble((found["method"], "bold green"), f" {', '.join(details)}" if details else "")
    return Panel(
        Group(head, found["reason"]), title="The lesson's recommendation", title_align="left", width=78
    )
