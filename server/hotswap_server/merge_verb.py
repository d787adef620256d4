"""The `merge` verb."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hotswap_server.adapters.checkpoint import RawCheckpoint


def merge(
    adapter: Annotated[str, typer.Argument(help="A PEFT directory, or TENANT/NAME[@VERSION] of --store.")],
    output: Annotated[Path, typer.Option(help="Directory to write; it must not exist.")],
    base: Annotated[str, typer.Option(help="A transformers directory, a hub id, or smollm2.")] = "smollm2",
    store: Annotated[str | None, typer.Option(help="Adapter store: a directory or an fsspec URL.")] = None,
) -> None:
    """Merge a LoRA into its base and write a plain transformers checkpoint."""
    from hotswap.bases import BaseConversionError, BaseNotFoundError, resolve_base
    from transformers.utils import logging as transformers_logging

    from hotswap_server.errors import HotswapError
    from hotswap_server.merged_base import write_merged_base

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        if output.exists():
            raise FileExistsError(f"--output {output}: it exists already; name a new directory")
        checkpoint = _read(adapter, store)
        path = resolve_base(base)
        write_merged_base(path, checkpoint, output)
    except (HotswapError, OSError, BaseNotFoundError, BaseConversionError, typer.BadParameter) as error:
        typer.echo(f"hotswap merge: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{adapter} is merged into {base}: {output}")


def _read(adapter: str, store: str | None) -> RawCheckpoint:
    from hotswap.layout import CONFIG_FILE, WEIGHTS_FILE, content_digest
    from hotswap.names import AdapterReference, InvalidAdapterNameError

    from hotswap_server.adapters.checkpoint import parse_checkpoint, parse_config
    from hotswap_server.adapters.manager import AdapterManager
    from hotswap_server.adapters.method import method_of
    from hotswap_server.core import AdapterRef

    if store is not None:
        try:
            AdapterReference.parse(adapter)
        except InvalidAdapterNameError as error:
            raise typer.BadParameter(f"{adapter}: {error}") from None
        opened = AdapterManager.open_store(store)
        return opened.read(opened.resolve(adapter))
    directory = Path(adapter)
    if not directory.is_dir():
        raise typer.BadParameter(
            f"{adapter}: is no directory; to merge an adapter of a store, say which with --store"
        )
    config, weights = (directory / CONFIG_FILE).read_bytes(), (directory / WEIGHTS_FILE).read_bytes()
    method = method_of(parse_config(config, adapter))
    return parse_checkpoint(config, weights, AdapterRef(adapter, 1, content_digest(config, weights), method))
