"""`hotswap serve`: every setting is a flag, a `HOTSWAP_SERVE_…` variable and a key of the YAML file."""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from hotswap_server.config import ServeSettings, SettingsError, flag_of, load_settings

if TYPE_CHECKING:
    from hotswap_server.app import Ready

USER_ERROR = 2
INTERRUPTED = 130


def _flags_of_settings(function: Callable[[Path | None, dict[str, Any]], None]) -> Callable[..., None]:
    """`function` as a command with a flag for every setting. Values stay text: the settings check them all,
    wherever they come from.
    """
    config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file with settings.")]
    parameters = [
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config)
    ]
    for name, field in ServeSettings.model_fields.items():
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name, field)
            )
        )

    def command(**values: Any) -> None:
        function(values.pop("config"), values)

    command.__name__ = command.__qualname__ = function.__name__
    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _option(name: str, field: FieldInfo) -> Any:
    flag = flag_of(name)
    help_text = field.description or ""
    if field.is_required():
        help_text += " Required."
    elif field.default not in (None, {}):
        default = field.default
        shown = default.human_readable() if isinstance(default, ByteSize) else str(default).lower()
        help_text += (
            f" \\[{shown}]" if not isinstance(default, bool) else f" \\[{'on' if default else 'off'}]"
        )
    if field.annotation in (bool, bool | None):
        return Annotated[
            bool | None,
            typer.Option(f"{flag}/--no-{name.replace('_', '-')}", help=help_text, show_default=False),
        ]
    return Annotated[
        str | None,
        typer.Option(flag, metavar=_metavar(name, field.annotation), help=help_text, show_default=False),
    ]


def _metavar(name: str, annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if name.endswith("weight"):
        return "NUMBER"
    return {int: "INTEGER", float: "SECONDS", ByteSize: "BYTES", Path: "FILE"}.get(annotation, "TEXT")


@_flags_of_settings
def serve(config: Path | None, flags: dict[str, Any]) -> None:
    """Serve a base model and the adapters of a store over gRPC."""
    try:
        settings = load_settings(config, **flags)
    except SettingsError as error:
        _fail(str(error))
    from hotswap_server.logging import configure_logging

    configure_logging(settings.log_level, settings.log_format)
    try:
        from transformers.utils import logging as transformers_logging

        from hotswap_server import app
    except ImportError as error:
        _fail(f"the server's libraries are missing ({error}); pip install 'hotswap[server]'")
    try:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        loaded = app.load(settings)
        asyncio.run(app.run(loaded, _print_ready))
    except app.StartupError as error:
        _fail(str(error))
    except KeyboardInterrupt:  # while loading; later ones are handled
        raise typer.Exit(INTERRUPTED) from None


def _print_ready(ready: Ready) -> None:
    from rich.console import Console
    from rich.markup import escape

    quantized = f", linear layers in {ready.quantization}" if ready.quantization else ""
    rows = {
        "base": f"{ready.base}, {ready.dtype} on {ready.device}",
        "weights": f"{ByteSize(ready.weight_bytes).human_readable()}{quantized}",
        "kernels": f"{ready.kernels}, {ready.threads} threads",
        "address": ready.address,
        "metrics": ready.metrics_address or "off",
        "callers": ready.security,
    }
    if ready.admin_address:
        rows["admin"] = ready.admin_address
    if ready.health_address:
        rows["health"] = ready.health_address
    rows |= {
        "store": f"{ready.store} ({ready.num_stored} adapter{'s' * (ready.num_stored != 1)})",
        "KV cache": f"{ready.kv_tokens:,} tokens; up to {ready.max_context:,} in a request",
        "slots": f"{ready.adapter_slots} adapters",
        "ready in": f"{ready.seconds:.1f} s",
    }
    console = Console(highlight=False, soft_wrap=True)
    console.print("[bold green]hotswap is ready[/bold green]")
    for name, value in rows.items():
        console.print(f"[bold]{name:<10}[/bold]{escape(value)}")
    console.file.flush()


def _fail(message: str) -> NoReturn:
    typer.echo(f"hotswap serve: {message}", err=True)
    raise typer.Exit(USER_ERROR)


if __name__ == "__main__":
    typer.run(serve)
