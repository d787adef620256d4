"""`hotswap plan --base …`: the plan of memory, as tables or JSON."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console

from hotswap_trainer.errors import TrainerError
from hotswap_trainer.planning import plan
from hotswap_trainer.planning.hardware import parse_gpu
from hotswap_trainer.planning.options import PlanOptions
from hotswap_trainer.planning.rule_plan import RulePlan


def run(base: str, *, gpu: str | None, as_json: bool, **settings: Any) -> None:
    """Print the plan. A mistake in the options ends the command with status 2."""
    try:
        options = PlanOptions(gpu=None if gpu is None else parse_gpu(gpu), **settings)
        waiting = Console(stderr=True)
        with waiting.status("planning") as status:
            made = plan(base, options, tell=lambda what: status.update(f"planning: {what}"))
    except TrainerError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(error.exit_code) from None
    if as_json:
        typer.echo(json.dumps(made.as_json(), indent=2))
        return
    if isinstance(made, RulePlan):
        from hotswap_trainer.planning import rule_view

        rule_view.show(made, Console(highlight=False))
        return
    from hotswap_trainer.planning import model_view

    model_view.show(made, Console(highlight=False))
