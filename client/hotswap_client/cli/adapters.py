"""Move a server's adapters between store and device, and change what a store holds."""

from __future__ import annotations

from typing import Annotated

import typer

from hotswap_client import Adapter, Client, InUsePolicy, Residency
from hotswap_client.cli._app import AdaptersGroup
from hotswap_client.cli._connection import with_client
from hotswap_client.cli._output import print_json

app = typer.Typer(cls=AdaptersGroup, help=__doc__, no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="TENANT/NAME, or with @VERSION or @ALIAS.")]
Newest = Annotated[int | None, typer.Option("--version", help="Absent: what requests get.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
@with_client
def list_(
    client: Client,
    prefix: Annotated[str, typer.Option(help="Only names that begin with this.")] = "",
    all_versions: Annotated[bool, typer.Option("--all-versions", help="Old versions too.")] = False,
    as_json: Json = False,
) -> None:
    """List the store's adapters and where they are."""
    found = client.adapters.list(name_prefix=prefix, all_versions=all_versions)
    if as_json:
        print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("adapter", "version", "method", "size", "where", "running")
    for adapter in found:
        marks = [str(adapter.residency)]
        marks += ["pinned"] * adapter.pinned + ["merged"] * adapter.merged + ["broken"] * bool(adapter.error)
        table.add_row(
            adapter.name,
            str(adapter.version),
            adapter.method,
            _size(adapter.size_bytes) if adapter.size_bytes else "not read yet",
            ", ".join(marks),
            str(adapter.running_requests),
        )
    Console().print(table)
    for adapter in found:
        if adapter.error:
            typer.echo(adapter.error, err=True)


@app.command()
@with_client
def show(client: Client, name: Name, version: Newest = None) -> None:
    """Describe one version of an adapter, as JSON."""
    print_json(client.adapters.show(name, version=version))


@app.command()
@with_client
def load(
    client: Client,
    name: Name,
    version: Newest = None,
    host: Annotated[
        bool, typer.Option("--host", help="To host memory alone, where it takes no slot.")
    ] = False,
) -> None:
    """Bring an adapter to the device before a request needs it."""
    moved = client.adapters.load(name, to=Residency.HOST if host else Residency.DEVICE, version=version)
    where = "in host memory" if moved.adapter.residency == Residency.HOST else "on the device"
    typer.echo(f"{_label(moved.adapter)} is {where} ({moved.seconds:.3f} s)")


@app.command()
@with_client
def unload(
    client: Client,
    name: Name,
    version: Annotated[int | None, typer.Option(help="Absent: every version in memory.")] = None,
    in_use: Annotated[
        InUsePolicy, typer.Option(help="What to do about requests that use it.")
    ] = InUsePolicy.REFUSE,
) -> None:
    """Remove an adapter from memory; the store keeps it."""
    result = client.adapters.unload(name, version=version, in_use=in_use)
    for adapter in result.adapters:
        typer.echo(f"{_label(adapter)} is unloaded")
    if not result.adapters:
        typer.echo(f"{name} was not in memory")
    if result.cancelled_requests:
        typer.echo(f"{result.cancelled_requests} requests were cancelled")


@app.command()
@with_client
def pin(client: Client, name: Name, version: Newest = None) -> None:
    """Load an adapter and keep it on the device."""
    typer.echo(f"{_label(client.adapters.pin(name, version=version))} is pinned")


@app.command()
@with_client
def unpin(
    client: Client,
    name: Name,
    version: Annotated[int | None, typer.Option(help="Absent: every pinned version.")] = None,
) -> None:
    """Let an adapter be evicted again."""
    released = client.adapters.unpin(name, version=version)
    for adapter in released:
        typer.echo(f"{_label(adapter)} is no longer pinned")
    if not released:
        typer.echo(f"{name} was not pinned")


@app.command()
@with_client
def merge(client: Client, name: Name, version: Newest = None) -> None:
    """Add a LoRA into the base weights."""
    moved = client.adapters.merge(name, version=version)
    typer.echo(f"{_label(moved.adapter)} is merged ({moved.seconds:.3f} s)")


@app.command()
@with_client
def unmerge(
    client: Client,
    name: Name,
    version: Annotated[int | None, typer.Option(help="Absent: the version that is merged.")] = None,
) -> None:
    """Restore the base weights bit for bit."""
    moved = client.adapters.unmerge(name, version=version)
    typer.echo(f"{_label(moved.adapter)} is no longer merged ({moved.seconds:.3f} s)")


@app.command()
@with_client
def calibrate(
    client: Client,
    only_resident: Annotated[
        bool, typer.Option("--only-resident", help="Make up no adapters for methods that have none.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure what each adapter method costs, in steps of it alone beside the base's."""
    costs = client.adapters.calibrate(only_resident=only_resident)
    if as_json:
        print_json(costs)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "path", "adapters")
    for heading in ("batch", "ms/step", "of the base's"):
        table.add_column(heading, justify="right")
    for cost in costs:
        table.add_row(
            "base" if cost.method == "none" else cost.method,
            str(cost.path),
            f"{cost.adapters} made up" if cost.made_up else str(cost.adapters or ""),
            str(cost.batch_size),
            f"{cost.step_seconds * 1e3:.2f}",
            f"{cost.overhead_ratio:.2f}",
        )
    Console().print(table)


def _label(adapter: Adapter) -> str:
    return f"{adapter.name}@{adapter.version}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
