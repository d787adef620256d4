"""The verb `plan`. It reads the options and hands over; what it plans is imported when it is asked for."""

from __future__ import annotations

from typing import Annotated

import typer


def plan(
    base: Annotated[
        str,
        typer.Option(
            help="A size (7b: the rule of thumb); or a model: a transformers directory, a hub id, smollm2, "
            "or a shape (llama-1b, llama-3b, llama-8b, llama-70b).",
            rich_help_panel="What",
        ),
    ] = "smollm2",
    gpu: Annotated[
        str | None,
        typer.Option(help="The GPU: its memory (24GB) or its name (h100).", rich_help_panel="What"),
    ] = None,
    seq: Annotated[
        int, typer.Option(help="Tokens of a training sequence.", rich_help_panel="Training")
    ] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences of a batch.", rich_help_panel="Training")] = 2,
    dtype: Annotated[
        str, typer.Option(help="bf16 or fp32: what is computed in.", rich_help_panel="Training")
    ] = "bf16",
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw8bit or sgd.", rich_help_panel="Training")
    ] = "adamw",
    methods: Annotated[
        str,
        typer.Option(help="Which of the methods, separated by commas.", rich_help_panel="Training"),
    ] = "full,lora,qlora,bottleneck,prefix",
    rank: Annotated[
        int | None,
        typer.Option(help="Of LoRA; by default 8, 16 or 32 by --complexity.", rich_help_panel="Training"),
    ] = None,
    target_modules: Annotated[
        str, typer.Option(help="LoRA's layers, as for hotswap train.", rich_help_panel="Training")
    ] = "all-linear",
    bottleneck_size: Annotated[
        int, typer.Option(help="Of bottleneck adapters.", rich_help_panel="Training")
    ] = 64,
    num_virtual_tokens: Annotated[int, typer.Option(help="Of a prefix.", rich_help_panel="Training")] = 20,
    tasks: Annotated[
        int, typer.Option(help="Adapters to serve over the base.", rich_help_panel="Serving")
    ] = 1,
    complexity: Annotated[
        str, typer.Option(help="Of a task: simple, moderate or complex.", rich_help_panel="What")
    ] = "moderate",
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a request, prompt and answer; by default 4096.", rich_help_panel="Serving"
        ),
    ] = None,
    fleet: Annotated[
        bool,
        typer.Option(
            "--fleet",
            help="Instead, tell what replicas of a server would do: see hotswap plan --fleet --help.",
            rich_help_panel="What",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what training and serving will need, and which method to take."""
    if fleet:  # `hotswap` itself runs another command then
        raise typer.BadParameter("is for the command `hotswap plan`", param_hint="--fleet")
    from hotswap_trainer.planning.memory_verb import run

    run(
        base,
        gpu=gpu,
        as_json=as_json,
        seq=seq,
        batch=batch,
        dtype=dtype,
        optimizer=optimizer,
        methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
        rank=rank,
        target_modules=target_modules,
        bottleneck_size=bottleneck_size,
        num_virtual_tokens=num_virtual_tokens,
        tasks=tasks,
        complexity=complexity,
        context=context,
    )
