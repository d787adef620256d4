"""`hotswap compare`: train each method on the same data, measure all of them, and say which to take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_FAILED = 1
_WRONG_OPTION = 2
_INTERRUPTED = 130
_MEASURED, _BUDGET, _LIMITS, _FILES = "What is compared", "Budget", "Limits of the recommendation", "Files"


def compare(
    base: Annotated[
        str,
        typer.Option(
            help="Base model: a transformers directory, a hub id, or smollm2.", rich_help_panel=_MEASURED
        ),
    ] = "smollm2",
    data: Annotated[
        str,
        typer.Option(
            help="JSONL file with a prompt and a completion on each line, or shipped data: demo, or one task "
            "of it: tickets, orders, reviews.",
            rich_help_panel=_MEASURED,
        ),
    ] = "demo",
    test_data: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file of questions; by default a part of --data.",
            dir_okay=False,
            show_default=False,
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    test_fraction: Annotated[
        float, typer.Option(help="Part of --data that is held out for questions.", rich_help_panel=_MEASURED)
    ] = 0.2,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas; default: all, and with --quick lora,bottleneck,prefix.",
            show_default=False,
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="An option of `hotswap train` for one method: METHOD.OPTION=VALUE, such as lora.rank=8.",
            metavar="TEXT",
            show_default=False,
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Serve the base in nf4, fp4 or int8; default: as it is stored.",
            show_default=False,
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of what is held out, of training, and of orders.", rich_help_panel=_MEASURED)
    ] = 0,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Passes over the data of each method; default: 1.5, and 0.75 with --quick.",
            show_default=False,
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="Optimiser steps of each method, instead of --epochs.",
            show_default=False,
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.", rich_help_panel=_BUDGET)] = 8,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Rounds in which latency is measured; default: 6, and 3 with --quick.",
            show_default=False,
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer methods, steps and questions.", rich_help_panel=_BUDGET)
    ] = False,
    max_latency_overhead: Annotated[
        str | None,
        typer.Option(
            help="Time between tokens over the base's, such as 10%.",
            metavar="SHARE",
            show_default=False,
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Size of a checkpoint, such as 50MB.",
            metavar="SIZE",
            show_default=False,
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Peak memory of training, such as 24GB.",
            metavar="SIZE",
            show_default=False,
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for the report, and for what is measured so far.",
            file_okay=False,
            rich_help_panel=_FILES,
        ),
    ] = Path("compare-report"),
    store: Annotated[
        Path | None,
        typer.Option(
            help="Where what is trained goes and stays; by default the user's cache.",
            file_okay=False,
            show_default=False,
            rich_help_panel=_FILES,
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train and measure again.", rich_help_panel=_FILES)
    ] = False,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure again what is trained.", rich_help_panel=_FILES)
    ] = False,
) -> None:
    """Train each method on the same data, measure them in one server, and write a report.

    Interrupted, the same command goes on where it was. What is trained stays in the store and is used again
    for the same data, options, seed and base.
    """
    from rich.console import Console
    from rich.markup import escape

    from hotswap_client import HotswapError
    from hotswap_client.cli.compare import options, story
    from hotswap_client.cli.demo.processes import DemoError, ended_by_signals

    console = Console(highlight=False)

    def fail(error: Exception, code: int) -> typer.Exit:
        message = escape(" ".join(str(error).split()))
        Console(stderr=True).print(f"[red]error:[/] {message}", highlight=False, soft_wrap=True)
        return typer.Exit(code)

    try:
        chosen = (
            methods if methods is not None else ",".join(options.QUICK_METHODS if quick else options.PRESETS)
        )
        comparison = options.CompareOptions(
            base=base,
            data=data,
            test_data=test_data,
            test_fraction=test_fraction,
            settings=options.method_settings(chosen, set_ or ()),
            budget=options.Budget(
                epochs=epochs if epochs is not None else 0.75 if quick else 1.5,
                max_steps=max_steps,
                batch_size=batch_size,
            ),
            measuring=options.Measuring(
                rounds=rounds if rounds is not None else 3 if quick else 6,
                new_tokens=24 if quick else 32,
                max_questions=36 if quick else None,
                knowledge_step=3 if quick else 1,
            ),
            seed=seed,
            quantize=quantize,
            limits=options.Limits(
                options.parse_share("--max-latency-overhead", max_latency_overhead),
                options.parse_bytes("--max-checkpoint", max_checkpoint),
                options.parse_bytes("--memory", memory),
            ),
            output=output,
            store=store or story.default_store(),
            fresh=fresh,
            remeasure=remeasure,
        )
    except options.CompareError as error:
        raise fail(error, _WRONG_OPTION) from None
    try:
        with ended_by_signals():
            story.tell(console, comparison)
    except (options.CompareError, DemoError, HotswapError) as error:
        raise fail(error, _FAILED) from None
    except KeyboardInterrupt:
        console.show_cursor()
        console.print("\nStopped; nothing is left running. The same command goes on from here.")
        raise typer.Exit(_INTERRUPTED) from None
