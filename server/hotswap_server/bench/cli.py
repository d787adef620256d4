"""The `bench` verb."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer


def bench(
    base: Annotated[str, typer.Option(help="A transformers directory, a hub id, or smollm2.")] = "smollm2",
    mix: Annotated[bool, typer.Option("--mix", help="Compare the adapter methods with the base.")] = False,
    requests: Annotated[
        int | None, typer.Option(min=2, help="Requests sent at once; default 16, with --mix 8.")
    ] = None,
    adapters: Annotated[int, typer.Option(min=1, help="Distinct adapters that they use.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated for every prompt.")] = 64,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA adapters.")] = 16,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds, each with all cases.")] = 3,
    kernels: Annotated[str, typer.Option(help="auto, native, onednn or reference.")] = "auto",
    quantize: Annotated[
        str | None, typer.Option(help="nf4, fp4 or int8: hold the base so, on both sides.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Steps of a base of this shape and random weights: llama-8b or tiny, see --device."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where --shape runs: cuda or cpu.")] = "cuda",
    eager: Annotated[bool, typer.Option("--eager", help="With --shape: without compiled layers.")] = False,
    costs: Annotated[
        Path | None,
        typer.Option(
            help="Measure a server's steps, loads and swaps, and write them to this file for `hotswap plan "
            "--fleet`. --requests is then the largest batch."
        ),
    ] = None,
    serve_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="With --costs: a setting of `hotswap serve`, such as threads=1."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random prompts and adapters.")] = 0,
) -> None:
    """Measure throughput and latency as ratios: beside transformers and PEFT, or of methods to the base."""
    from hotswap.bases import BaseConversionError, BaseNotFoundError, resolve_base
    from rich.console import Console

    from hotswap_server.bench.workload import Shape, default_cases
    from hotswap_server.errors import HotswapError
    from hotswap_server.logging import configure_logging

    configure_logging("warning")
    console = Console()
    if shape is not None:
        _write(output, _measure_shape(console, shape, device, eager))
        return
    try:
        path = resolve_base(base)
    except (BaseNotFoundError, BaseConversionError) as error:
        typer.echo(f"hotswap bench: {error}", err=True)
        raise typer.Exit(2) from None
    sizes = Shape(prompt_tokens, new_tokens, rank)
    try:
        if costs is not None:
            options = serve_option or []
            _measure_costs(console, path, costs, requests or 16, rank, repeat, quantize, options, seed)
            return
        with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as store:
            if mix:
                figures = _measure_mix(
                    console,
                    path,
                    Path(store),
                    adapters,
                    requests or 8,
                    sizes,
                    repeat,
                    kernels,
                    quantize,
                    seed,
                )
            else:
                cases = default_cases(adapters, requests or 16)
                figures = _measure(console, path, Path(store), cases, sizes, repeat, kernels, quantize, seed)
    except HotswapError as error:
        typer.echo(f"hotswap bench: {error}", err=True)
        raise typer.Exit(2) from None
    _write(output, figures)


def _write(output: Path | None, figures: Any) -> None:
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n")


def _measure_shape(console: Any, shape: str, device: str, eager: bool) -> Any:
    import torch
    from hotswap.shapes import SHAPES

    from hotswap_server.bench.gpu import measure_gpu
    from hotswap_server.bench.gpu_report import print_gpu

    if shape not in SHAPES:
        typer.echo(f"hotswap bench: --shape must be one of {', '.join(SHAPES)}, got {shape!r}", err=True)
        raise typer.Exit(2)
    if device not in ("cuda", "cpu") or (device == "cuda" and not torch.cuda.is_available()):
        typer.echo(f"hotswap bench: --device {device}: torch sees no such device here; give cpu", err=True)
        raise typer.Exit(2)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with console.status("starting") as status:
        figures = measure_gpu(shape, torch.device(device), dtype, eager=eager, tell=status.update)
    print_gpu(console, figures)
    return figures


def _measure_costs(
    console: Any,
    path: Path,
    output: Path,
    requests: int,
    rank: int,
    repeat: int,
    quantize: str | None,
    options: list[str],
    seed: int,
) -> None:
    from hotswap_server.bench.costs import Plan, measure_costs, print_costs
    from hotswap_server.config import flag_of

    flags: list[str] = []
    for option in options:
        name, equals, value = option.partition("=")
        if not (name and equals):
            typer.echo(
                f"hotswap bench: --serve-option must be NAME=VALUE, as in threads=1, got {option!r}", err=True
            )
            raise typer.Exit(2)
        flags += [flag_of(name), value]
    plan = Plan(max_batch=requests, rank=rank, rounds=repeat, seed=seed)
    with console.status("starting") as status:
        found = measure_costs(path, plan, quantize=quantize, options=flags, tell=status.update)
    found.write(output)
    print_costs(console, found)


def _measure_mix(
    console: Any,
    path: Path,
    store: Path,
    adapters: int,
    requests: int,
    shape: Any,
    repeat: int,
    kernels: str,
    quantize: str | None,
    seed: int,
) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoTokenizer

    from hotswap_server.bench.mix import measure_mix, print_mix, write_mix
    from hotswap_server.bench.ours import EngineSide
    from hotswap_server.engine.base import load_base
    from hotswap_server.kernels import select_kernels

    torch.manual_seed(seed)
    device = torch.device("cpu")
    chosen = select_kernels(device, torch.float32, kernels)
    base = load_base(path, kernels=chosen, device=device, dtype=torch.float32, quantize=quantize)
    with console.status("writing adapters"):
        cases = write_mix(base, store, requests=requests, adapters=adapters, rank=shape.rank)
    side = EngineSide(base, AutoTokenizer.from_pretrained(path), store, 2 * requests, shape.rank)
    try:
        with console.status("measuring"):
            figures = measure_mix(side, cases, shape, base.vocab_size, repeat=repeat, seed=seed)
    finally:
        side.close()
    print_mix(console, figures, kernels=chosen.name, threads=torch.get_num_threads(), shape=shape)
    return figures


def _measure(
    console: Any,
    path: Path,
    store: Path,
    cases: list[Any],
    shape: Any,
    repeat: int,
    kernels: str,
    quantize: str | None,
    seed: int,
) -> list[dict[str, Any]]:
    import torch
    from rich.progress import Progress
    from transformers import AutoTokenizer

    from hotswap_server.bench.ours import EngineSide
    from hotswap_server.bench.report import print_report, summarise
    from hotswap_server.bench.theirs import StaticBatchSide
    from hotswap_server.bench.workload import Round, make_prompts, write_adapters
    from hotswap_server.engine.base import load_base, load_causal_lm
    from hotswap_server.engine.quantization import quantization_arguments
    from hotswap_server.kernels import select_kernels

    torch.manual_seed(seed)
    device = torch.device("cpu")
    arguments = quantization_arguments(path, quantize, device=device, dtype=torch.float32)
    model = load_causal_lm(path, dtype=torch.float32, **arguments).eval()
    write_adapters(model, store, cases, shape.rank)
    chosen = select_kernels(device, torch.float32, kernels)
    base = load_base(path, kernels=chosen, device=device, dtype=torch.float32, quantize=quantize)
    slots = sum(case.adapters for case in cases) or 1
    ours = EngineSide(base, AutoTokenizer.from_pretrained(path), store, slots, shape.rank)
    theirs = StaticBatchSide(model, store)
    rounds: list[Round] = []
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=len(cases) * (repeat + 1))
            # All cases in every round, so that a machine that slows down does so for each of them.
            for number in range(repeat + 1):
                pairs = []
                for case in cases:
                    prompts = make_prompts(case.requests, shape.prompt_tokens, base.vocab_size, seed)
                    for side in (ours, theirs):
                        side.prepare(case)
                    length = shape.new_tokens if number else min(4, shape.new_tokens)
                    pairs.append((ours.run(case, prompts, length), theirs.run(case, prompts, length)))
                    progress.advance(task)
                if number:  # the first round warms up
                    rounds.append(pairs)
    finally:
        ours.close()
    figures = summarise(cases, rounds)
    print_report(console, figures, kernels=chosen.name, threads=torch.get_num_threads(), shape=shape)
    return figures
