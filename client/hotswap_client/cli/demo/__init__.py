"""`hotswap demo`: three tenants, three methods, one base, one batch. The verb; its parts are beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_FAILED = 1
_INTERRUPTED = 130


def demo(
    base: Annotated[
        str, typer.Option(help="Base model: a transformers directory, a hub id, or smollm2.")
    ] = "smollm2",
    store: Annotated[
        Path | None,
        typer.Option(
            help="Where the adapters go and stay; by default the user's cache.",
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train again what the store has, as new versions.")
    ] = False,
) -> None:
    """Train a LoRA, a bottleneck adapter and a prefix, serve them, and ask all three in one batch.

    Takes minutes on two cores, seconds once the adapters are trained. They stay in the store; nothing stays
    running.
    """
    from rich.console import Console
    from rich.markup import escape

    from hotswap_client.cli.demo import story
    from hotswap_client.cli.demo.processes import DemoError, ended_by_signals

    console = Console(highlight=False)
    try:
        with ended_by_signals():
            story.tell(console, base, store or story.default_store(), fresh=fresh)
    except DemoError as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(_FAILED) from None
    except KeyboardInterrupt:
        console.show_cursor()
        console.print("\nStopped; nothing is left running. The same command goes on from here.")
        raise typer.Exit(_INTERRUPTED) from None
