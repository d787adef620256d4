"""The options that every verb with a connection shares, and the client made of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from hotswap_client import TLS, Client

P = ParamSpec("P")
_PANEL = "Connection"


def _connection(
    target: Annotated[
        str, typer.Option(help="Server, HOST:PORT.", envvar="HOTSWAP_TARGET", rich_help_panel=_PANEL)
    ] = "localhost:50051",
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Sent as a bearer token. The variable keeps it out of the process list.",
            envvar="HOTSWAP_API_KEY",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds until the call is given up.", min=0, rich_help_panel=_PANEL)
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Encrypt the connection.", rich_help_panel=_PANEL)
    ] = False,
    ca: Annotated[
        Path | None,
        typer.Option(help="Authority to trust, PEM; implies --tls.", exists=True, rich_help_panel=_PANEL),
    ] = None,
    cert: Annotated[
        Path | None,
        typer.Option(help="Own certificate, PEM; implies --tls.", exists=True, rich_help_panel=_PANEL),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Own certificate's key, PEM.", exists=True, rich_help_panel=_PANEL)
    ] = None,
    allow_plaintext_key: Annotated[
        bool,
        typer.Option(
            "--allow-plaintext-key",
            help="Send the key to another machine even without TLS.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
) -> Client:
    if (cert is None) != (key is None):
        raise typer.BadParameter("--cert and --key go together")
    files = TLS(ca=ca, cert=cert, key=key) if tls or ca or cert else False
    try:
        return Client(
            target, api_key=api_key, timeout=timeout, tls=files, allow_plaintext_key=allow_plaintext_key
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def with_client(function: Callable[Concatenate[Client, P], None]) -> Callable[..., None]:
    """A command that takes the connection's options too and calls `function` with a client made of them."""
    shared = inspect.signature(_connection, eval_str=True).parameters
    _, *own = inspect.signature(function, eval_str=True).parameters.values()

    def command(**options: Any) -> None:
        connection = {name: options.pop(name) for name in shared}
        with _connection(**connection) as client:
            function(client, **options)  # type: ignore[call-arg]

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *shared.values())
    ]
    # typer reads a command's options from its signature.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    return command
