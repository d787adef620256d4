"""`hotswap plan --fleet`: what replicas would do, or how many are needed, from measured costs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hotswap_server.fleet.options import Fleet, FleetError, Traffic


def plan_fleet(
    costs: Annotated[
        Path | None, typer.Option(help="What `hotswap bench --costs` wrote on such a machine. Required.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second, of all replicas together. Required.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Replicas, where no target is given.")] = 1,
    ttft_p95: Annotated[
        float | None,
        typer.Option("--ttft-p95", metavar="SECONDS", help="Find the replicas for this time to first token."),
    ] = None,
    itl_p95: Annotated[
        float | None,
        typer.Option("--itl-p95", metavar="SECONDS", help="Find the replicas for this time between tokens."),
    ] = None,
    max_replicas: Annotated[int, typer.Option(help="Most replicas that the search tries.")] = 128,
    adapters: Annotated[int, typer.Option(help="Distinct adapters that are asked for.")] = 100,
    zipf: Annotated[float, typer.Option(help="Skew of their popularity; 0 is uniform.")] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt, in the mean.")] = 256,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated, in the mean.")] = 128,
    length_cv: Annotated[
        float, typer.Option(help="Standard deviation of both over their means; 0: all alike.")
    ] = 0.0,
    seconds: Annotated[float, typer.Option(help="Time that is simulated.")] = 120.0,
    warmup: Annotated[float, typer.Option(help="Of that, what is not counted.")] = 20.0,
    cold: Annotated[bool, typer.Option("--cold", help="Start with nothing in memory.")] = False,
    affinity: Annotated[str, typer.Option(help="ring: an adapter has one replica; or round-robin.")] = "ring",
    ring_size: Annotated[int, typer.Option(help="Least entries of the ring.")] = 1024,
    adapter_slots: Annotated[
        int, typer.Option(help="As for `hotswap serve`, as are those that follow.")
    ] = 16,
    host_cache_bytes: Annotated[str, typer.Option(metavar="BYTES", help="Such as 4GiB.")] = "1GiB",
    load_workers: Annotated[int, typer.Option()] = 2,
    max_batch_size: Annotated[int, typer.Option()] = 64,
    max_batch_tokens: Annotated[int, typer.Option()] = 512,
    max_queue: Annotated[int, typer.Option()] = 1024,
    kv_tokens: Annotated[
        int | None, typer.Option(help="Tokens in the key-value cache, as the server says; default: no limit.")
    ] = None,
    store_latency: Annotated[
        float, typer.Option(metavar="SECONDS", help="Added to each load, for a store farther away.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of everything that is random.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file too; - is standard output.")
    ] = None,
) -> None:
    """Simulate replicas: latencies, hit rates, and how many are needed."""
    from hotswap_server.fleet.costs import Costs
    from hotswap_server.fleet.search import Needed, Target, replicas_needed
    from hotswap_server.fleet.simulate import simulate

    if costs is None:
        _fail("costs: is required; measure them with `hotswap bench --costs FILE` and give --costs FILE")
    if rate is None:
        _fail("rate: is required; give --rate, the requests per second of all replicas together")
    try:
        fleet = Fleet(
            replicas=replicas,
            adapter_slots=adapter_slots,
            host_cache_bytes=_bytes("host_cache_bytes", host_cache_bytes),
            load_workers=load_workers,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            kv_tokens=kv_tokens,
            max_queue=max_queue,
            affinity=affinity,  # type: ignore[arg-type]
            ring_size=ring_size,
            store_latency=store_latency,
        )
        traffic = Traffic(
            rate=rate,
            adapters=adapters,
            zipf=zipf,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            length_cv=length_cv,
            seconds=seconds,
            warmup=warmup,
            warm=not cold,
            seed=seed,
        )
        measured = Costs.read(costs)
        target = None
        if ttft_p95 is None and itl_p95 is None:
            found = Needed(replicas, (simulate(measured, fleet, traffic),))
        else:
            target = Target(ttft_p95, itl_p95)
            found = replicas_needed(measured, fleet, traffic, target, max_replicas=max_replicas)
    except FleetError as error:
        _fail(str(error))
    figures = {
        "costs": str(costs),
        "fleet": asdict(replace(fleet, replicas=found.report.replicas)),
        "traffic": asdict(traffic),
        "target": None if target is None else asdict(target),
        "replicas_needed": None if target is None else found.replicas,
        "reports": [asdict(report) for report in found.reports],
    }
    if output == Path("-"):
        typer.echo(json.dumps(figures, indent=2))
    else:
        if output is not None:
            output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        _print(found, traffic, target)
    if target is not None and found.replicas is None:
        raise typer.Exit(1)


def _print(found: Any, traffic: Traffic, target: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{traffic.rate:g} requests/s over {traffic.adapters:,} adapters (Zipf {traffic.zipf:g}), "
        f"{traffic.prompt_tokens} + {traffic.output_tokens} tokens each"
    )
    table.add_column("replicas", justify="right")
    for heading in (
        "TTFT p50 / p95 / p99, ms",
        "ITL p50 / p95, ms",
        "in a slot",
        "else in host",
        "loads/s",
        "in steps, mean / most",
        "batch",
        "tokens/s",
        "refused",
    ):
        table.add_column(heading, justify="right")
    for report in found.reports:
        table.add_row(
            str(report.replicas),
            " / ".join(f"{v * 1e3:.0f}" for v in (report.ttft.p50, report.ttft.p95, report.ttft.p99)),
            " / ".join(f"{v * 1e3:.1f}" for v in (report.itl.p50, report.itl.p95)),
            f"{report.device_hit_rate:.1%}",
            f"{report.host_hit_rate:.1%}",
            f"{report.loads_per_second:.1f}",
            f"{report.utilisation:.0%} / {report.utilisation_of_busiest:.0%}",
            f"{report.batch:.1f}",
            f"{report.output_tokens_per_second:,.0f}",
            f"{report.refused / report.requests:.1%}",
        )
    console = Console()
    console.print(table)
    if target is None:
        return
    bounds = [
        f"{name} p95 of {value * 1e3:g} ms"
        for name, value in (("TTFT", target.ttft_p95), ("ITL", target.itl_p95))
        if value is not None
    ]
    if found.replicas is None:
        console.print(f"No number up to {found.reports[-1].replicas} replicas meets {' and '.join(bounds)}.")
    else:
        console.print(f"[bold]{found.replicas}[/bold] replicas meet {' and '.join(bounds)}.")


def _bytes(field: str, text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise FleetError(field, f"must be a number of bytes such as 4GiB or 512MB, got {text!r}") from None


def _fail(message: str) -> NoReturn:
    typer.echo(f"hotswap plan --fleet: {message}", err=True)
    raise typer.Exit(2)
