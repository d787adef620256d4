"""`hotswap train`. Its flags are the fields of the option classes; torch is imported when a run starts."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from hotswap_trainer import methods
from hotswap_trainer.config import TrainOptions, configure
from hotswap_trainer.errors import TrainerError
from hotswap_trainer.options import OptionSpec, specs

if TYPE_CHECKING:
    from hotswap_trainer.run import Published

_INTERRUPTED = 130


def train(config: Path | None = None, **flags: Any) -> None:
    """Train an adapter, or a whole model, and publish it as a new version in a store.

    Every option is also a key of the --config file; flags win over the file.
    On several GPUs: torchrun --nproc-per-node 2 -m hotswap_trainer, and the same options.
    """
    # Processes that torchrun or accelerate starts fail alike: one of each machine says why.
    console = Console(stderr=True, quiet=os.environ.get("LOCAL_RANK", "0") != "0")
    try:
        run = configure(flags, config)
        from hotswap_trainer.run import train as start

        published = start(run)
    except TrainerError as error:
        console.print(f"[red]error:[/] {_escaped(error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        console.print(
            "Interrupted. The same command goes on from the last checkpoint, if there is one already."
        )
        raise typer.Exit(_INTERRUPTED) from None
    if published is not None:
        _summarise(published, Console())


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()))


def _summarise(published: Published, console: Console) -> None:
    report, options = published.report, published.report.run.options
    outcome, parameters = report.outcome, report.parameters
    history = {kind: [p.loss for p in outcome.history if p.kind == kind] for kind in ("train", "eval")}
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row(report.run.method.result, f"[bold green]{options.name}@{published.version}[/]")
    table.add_row("where", str(published.path))
    table.add_row(
        "method", f"{report.run.method.name}, {parameters.trainable:,} parameters ({parameters.percent:.2f}%)"
    )
    for kind, label in (("train", "training loss"), ("eval", "evaluation loss")):
        if losses := history[kind]:
            table.add_row(label, f"{losses[0]:.3f} → {losses[-1]:.3f}")
    per_step = outcome.seconds / max(1, outcome.num_steps)
    table.add_row("time", f"{outcome.seconds:.0f} s, {outcome.num_steps} steps of {per_step:.2f} s")
    table.add_row("next", report.run.method.serving(options, published.path))
    console.print(table)


def _parameter(spec: OptionSpec, owners: list[str]) -> inspect.Parameter:
    """A keyword of `train` for typer. Its default is None, so that a flag not given leaves YAML's value."""
    if spec.type is bool:
        annotation: Any = Optional[bool]  # noqa: UP045
        names = [f"{spec.flag}/--no-{spec.flag[2:]}"]
    else:
        annotation = Optional[list[str]] if spec.repeatable else Optional[str]  # noqa: UP045
        names = [spec.flag, *([spec.short] if spec.short else [])]
    help_text = spec.help
    if spec.name == "method":
        help_text += " " + "; ".join(f"{m.name}: {m.summary}" for m in methods.available().values()) + "."
    if not spec.required and spec.default is not None:
        shown = str(spec.default).lower() if spec.type is bool else spec.default
        help_text += f" [dim]\\[default: {shown}][/]"
    if spec.required:
        help_text += " [red]\\[required][/]"
    default = typer.Option(
        None,
        *names,
        help=help_text,
        metavar="" if spec.type is bool else spec.metavar,
        show_default=False,
        rich_help_panel=f"Method {', '.join(owners)}" if owners else spec.group,
    )
    return inspect.Parameter(
        spec.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _signature() -> inspect.Signature:
    """`train`'s parameters: --config, the common options, and each method option once."""
    config = typer.Option(
        None, "--config", help="YAML file with any of these options.", metavar="PATH", rich_help_panel="Run"
    )
    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=config,
            annotation=Optional[Path],  # noqa: UP045
        ),
        *(_parameter(spec, []) for spec in specs(TrainOptions)),
    ]
    declared: dict[str, tuple[OptionSpec, list[str]]] = {}
    for method in methods.available().values():
        for spec in specs(method.options):
            declared.setdefault(spec.name, (spec, []))[1].append(method.name)
    return inspect.Signature([*parameters, *(_parameter(spec, owners) for spec, owners in declared.values())])


# typer reads the flags from the function's signature.
train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {}
