"""Create, list and revoke the API keys of a server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from pydantic import ValidationError

from hotswap_server.config import ENV_PREFIX
from hotswap_server.security.keys import ApiKey
from hotswap_server.security.keys_file import CertificateEntry, KeyEntry, KeysFileError, read_keys, rewriting

_UNITS: Final = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_FLAGS: Final = {
    "adapters": "--adapters",
    "principal": "NAME",
    "role": "--role",
    "requests_per_second": "--rate",
    "tokens_per_minute": "--tokens-per-minute",
    "concurrent_requests": "--concurrency",
}

app = typer.Typer(help=__doc__, no_args_is_help=True)

File = Annotated[
    Path,
    typer.Option(
        "--file",
        help="The server's --keys-file, YAML or JSON.",
        envvar=f"{ENV_PREFIX}KEYS_FILE",
        dir_okay=False,
        show_default=False,
    ),
]


@app.command()
def create(
    file: File,
    name: Annotated[str, typer.Argument(help="Whose key: what logs and limits go by. Keys can share it.")],
    role: Annotated[str, typer.Option(help="user, publisher or admin.")] = "user",
    adapters: Annotated[
        list[str] | None,
        typer.Option(help="Adapters: * or TENANT/NAME with * and ?; can be repeated. Absent: base alone."),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Most requests a second.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Most tokens a minute, read and generated.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Most calls at once.")] = None,
    expires: Annotated[
        str | None, typer.Option(help="When: 12h, 30d, 8w, or a date and time such as 2030-01-31T00:00Z.")
    ] = None,
) -> None:
    """Create a key, add it to the file, and print it, which is the one time that it is shown."""
    key, now = ApiKey.create(), datetime.now(UTC).replace(microsecond=0)
    given: dict[str, Any] = {
        "requests_per_second": rate,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_requests": concurrency,
    }
    try:
        entry = KeyEntry(
            id=key.id,
            hash=key.hash,
            principal=name,
            role=role,
            adapters=tuple(adapters or ()),
            created=now,
            expires=None if expires is None else _expiry(expires, now),
            **given,
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        rule = str(problem["msg"]).removeprefix("Value error, ")
        _fail(f"{_FLAGS.get(str(problem['loc'][0]), problem['loc'][0])}: {rule[0].lower()}{rule[1:]}")
    with _file_errors(), rewriting(file) as documents:
        documents.append(documents[0].model_copy(update={"keys": (*documents[0].keys, entry)}))
    until = "" if entry.expires is None else f", until {_shown(entry.expires)}"
    typer.echo(f"key {key.id} of {name} ({entry.role}{until}), shown this once:", err=True)
    typer.echo(key.text)


@app.command("list")
def list_(file: File) -> None:
    """List the keys and client certificates of the file."""
    from rich.console import Console
    from rich.table import Table

    with _file_errors():
        document = read_keys(file)
    table = Table("who", "role", "adapters", "limits")
    table.add_column("key or certificate", no_wrap=True)  # `revoke` takes it whole
    table.add_column("created")
    table.add_column("expires")
    now = datetime.now(UTC)
    rows: list[tuple[KeyEntry | CertificateEntry, tuple[str, str, str]]] = [
        (key, (key.id, _shown(key.created), _shown(key.expires) + " (expired)" * key.expired(now)))
        for key in document.keys
    ]
    rows += [(certificate, (certificate.subject, "", "")) for certificate in document.certificates]
    for entry, shown in rows:
        adapters = ", ".join(entry.adapters) or "base alone"
        table.add_row(entry.principal, entry.role, adapters, _limits(entry), *shown)
    Console().print(table)


@app.command()
def revoke(
    file: File,
    which: Annotated[str, typer.Argument(metavar="ID|NAME", help="A key's id, or whose: then all theirs.")],
) -> None:
    """Remove keys from the file; a server that reads it refuses them within a second or two."""
    with _file_errors(), rewriting(file) as documents:
        revoked = [key for key in documents[0].keys if which in (key.id, key.principal)]
        if not revoked:
            _fail(f"{file} has no key with the id or name {which}; see `hotswap keys list`")
        kept = tuple(key for key in documents[0].keys if key not in revoked)
        documents.append(documents[0].model_copy(update={"keys": kept}))
    for key in revoked:
        typer.echo(f"revoked {key.id} of {key.principal}")


def _limits(entry: KeyEntry | CertificateEntry) -> str:
    limits = (
        (entry.requests_per_second, "requests/s"),
        (entry.tokens_per_minute, "tokens/min"),
        (entry.concurrent_requests, "at once"),
    )
    return ", ".join(f"{value:g} {unit}" for value, unit in limits if value is not None)


def _expiry(text: str, now: datetime) -> datetime:
    if match := re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", text):
        return now + int(match[1]) * _UNITS[match[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        _fail(f"--expires: must be such as 30d or 2030-01-31T00:00Z, got {text!r}")
    moment = moment if moment.tzinfo is not None else moment.astimezone()
    if moment <= now:
        _fail(f"--expires: {text} is past")
    return moment


def _shown(moment: datetime | None) -> str:
    return "" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%MZ")


@contextmanager
def _file_errors() -> Iterator[None]:
    """End the command where the file cannot be used."""
    try:
        yield
    except KeysFileError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"hotswap keys: {message}", err=True)
    raise typer.Exit(2)
