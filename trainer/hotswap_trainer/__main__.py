"""`python -m hotswap_trainer`: the `train` command alone, for `torchrun -m` and `accelerate launch -m`."""

from __future__ import annotations

import typer

from hotswap_trainer.cli import train

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command()(train)
    app()
