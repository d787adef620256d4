"""A model's plan as tables for a terminal of 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotswap.bases import DEFAULT_BASE
from hotswap.shapes import SHAPES
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hotswap_trainer.planning.hardware import required, smallest
from hotswap_trainer.planning.model_plan import MethodPlan, ModelPlan
from hotswap_trainer.planning.units import GIB, show_bytes

if TYPE_CHECKING:
    from hotswap_trainer.planning.step import Step

_COMPONENTS = ("weights", "constants", "gradients", "optimizer", "activations")


def show(plan: ModelPlan, console: Console) -> None:
    options = plan.options
    console.print(
        f"[bold]{plan.base}[/]: {plan.num_parameters:,} parameters; {options.dtype}, {options.optimizer}, "
        f"{options.batch} x {options.seq} tokens\n"
    )
    console.print(_training(plan))
    console.print(
        Text(
            "The second row of a method is with gradient checkpointing. Gradients come as activations go, "
            "so a peak can be less than the sum. A GPU needs 5% and 0.75 GiB more than the peak.\n",
            "dim",
        )
    )
    console.print(_adapters(plan))
    console.print(_serving(plan))
    console.print(_recommendation(plan))


def _training(plan: ModelPlan) -> Table:
    table = _table("Training memory, GiB")
    table.add_column("method", style="cyan", no_wrap=True)
    for name in ("weights", "const", "grads", "optim", "activ"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("peak", justify="right", style="bold", no_wrap=True)
    table.add_column("fits" if plan.options.gpu else "smallest GPU", no_wrap=True)
    for planned in plan.methods:
        for label, step in ((planned.method, planned.step), ("  recompute", planned.checkpointed)):
            if step is not None:
                cells = (_gib(getattr(step, name)) for name in _COMPONENTS)
                table.add_row(label, *cells, _gib(step.peak), _fits(plan, step))
    return table


def _adapters(plan: ModelPlan) -> Table:
    table = _table("What is trained, and an adapter in the server's memory")
    table.add_column("method", style="cyan", no_wrap=True)
    for name in ("parameters", "%", "checkpoint", "served", "per GB"):
        table.add_column(name, justify="right", no_wrap=True)
    for planned in plan.methods:
        table.add_row(*_adapter_row(plan, planned))
    return table


def _adapter_row(plan: ModelPlan, planned: MethodPlan) -> tuple[str, ...]:
    count, serving = planned.step.num_trained, plan.serving
    served = ("a base of its own", "-")
    if planned.method != "full":
        served = (show_bytes(serving.adapter(count)), f"{serving.adapters_per_gb(count):,}")
    return (
        planned.method,
        f"{count:,}",
        f"{100 * count / plan.num_parameters:.3g}",
        show_bytes(plan.checkpoint_bytes(planned)),
        *served,
    )


def _serving(plan: ModelPlan) -> Text:
    serving, gpu = plan.serving, plan.options.gpu
    request = serving.kv_per_request(plan.context)
    lines = [
        f"\nServing: {show_bytes(serving.weights)} of weights ({show_bytes(serving.weights_nf4)} in NF4); "
        f"{show_bytes(request)} of keys and values per request of {plan.context} tokens."
    ]
    if gpu is not None:
        counts = [serving.requests(gpu, context=plan.context, adapters=0, nf4=nf4) for nf4 in (False, True)]
        lines.append(
            f"Beside the base the GPU holds {counts[0]:,} such requests at once ({counts[1]:,} in NF4)."
        )
    return Text("\n".join(lines))


def _recommendation(plan: ModelPlan) -> Panel:
    found = plan.recommendation
    head = Text(found.method or "none fits", "bold green" if found.method else "bold red")
    body = [Text.assemble(head, f" on {found.gpu}"), Text(found.reason)]
    if found.method:
        base = (
            "DIR" if plan.base in SHAPES and plan.base != DEFAULT_BASE else plan.base
        )  # a shape has no weights
        body.append(Text(f"hotswap train --base {base} {found.flags} …", "dim"))
    return Panel(Group(*body), title="Recommendation", title_align="left", width=78)


def _fits(plan: ModelPlan, step: Step) -> str:
    if plan.options.gpu is not None:
        return "[green]yes[/]" if required(step.peak) <= plan.options.gpu else "[red]no[/]"
    gpu = smallest(step.peak)
    return gpu.name if gpu else "several"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}" if count else "-"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
