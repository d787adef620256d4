"""`hotswap adapters import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from hotswap.bases import BaseConversionError, BaseNotFoundError, resolve_base
from hotswap.layout import PublishError
from hotswap.names import AdapterName, InvalidAdapterNameError
from hotswap.storage import StorageError

from hotswap_trainer.errors import CheckpointError


def import_adapter(
    directory: Annotated[Path, typer.Argument(help="What AdapterHub's save_adapter wrote.")],
    name: Annotated[str, typer.Option(help="The adapter's name here: TENANT/NAME.")],
    store: Annotated[
        str,
        typer.Option(
            help="The store, a directory or a URL such as s3://…; the adapter becomes a new version in it."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="A transformers directory, a hub id, or smollm2: the adapter is checked against it."
        ),
    ] = None,
) -> None:
    """Bring a bottleneck adapter that AdapterHub saved into a store."""
    try:
        parsed = AdapterName.parse(name)
        path = resolve_base(base, progress=True) if base is not None else None
        from hotswap_trainer import adapterhub

        version = adapterhub.import_adapter(directory, parsed, store, base=path, label=base)
    except InvalidAdapterNameError as error:
        raise typer.BadParameter(str(error), param_hint="--name") from None
    except (BaseNotFoundError, BaseConversionError) as error:
        raise typer.BadParameter(str(error), param_hint="--base") from None
    except (CheckpointError, PublishError, StorageError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{parsed}@{version} is in {store}")
