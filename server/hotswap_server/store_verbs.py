"""`hotswap adapters publish`, `alias`, `rollback`, `delete` and `verify`, which change a store themselves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from hotswap.aliases import LATEST, Target
from hotswap.layout import (
    CONFIG_FILE,
    HIDDEN_PREFIX,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    PublishError,
    publish,
    version_location,
)
from hotswap.names import (
    AdapterName,
    AdapterReference,
    InvalidAdapterNameError,
    check_alias,
    parse_version,
)
from hotswap.storage import Storage, StorageError, StoragePackageError, open_storage
from hotswap.store_admin import (
    Change,
    StoreChangeError,
    default_version,
    delete,
    read_aliases,
    roll_back,
    set_alias,
    versions,
)

FAILED: Final = 1
USAGE: Final = 2

_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})

Store = Annotated[
    str,
    typer.Option(
        help="A directory, or a URL such as s3://BUCKET/PATH.", envvar="HOTSWAP_STORE", metavar="DIR|URL"
    ),
]
Name = Annotated[str, typer.Argument(help="TENANT/NAME.", metavar="NAME")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def publish_adapter(
    directory: Annotated[
        Path, typer.Argument(help="A PEFT directory.", exists=True, file_okay=False, metavar="DIR")
    ],
    name: Annotated[str, typer.Option(help="The adapter's name in the store: TENANT/NAME.")],
    store: Store,
    alias: Annotated[
        list[str] | None, typer.Option(help="Point this alias at the new version; may repeat.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a PEFT directory and publish it as an adapter's next version.

    Links are followed; pickles, hidden files and directories in it are left out. What requests get changes
    unless `stable`, or `latest`, is set: `hotswap adapters alias` says so.
    """
    parsed = _name(name, "--name")
    aliases = [_alias(text, "--alias") for text in alias or ()]
    with _told():
        _check(directory, str(parsed))
        version = publish(store, parsed, lambda target: _copy(directory, target))
        storage = open_storage(store)
        for text in aliases:
            set_alias(storage, parsed, text, Target(version))
        served, by = default_version(storage, parsed)
    if as_json:
        where = version_location(store, parsed, version)
        _print_json({"adapter": str(parsed), "version": version, "where": where, "aliases": aliases})
        return
    typer.echo(f"{parsed}@{version} is in {store}")
    for text in aliases:
        typer.echo(f"alias {text} is {version}")
    if served is not None and version not in served.versions:
        typer.echo(f"requests that name no version still get {served}, by alias {by}")


def alias_adapter(
    name: Name,
    alias: Annotated[
        str | None, typer.Argument(help="Such as stable. Absent: show all aliases.", metavar="[ALIAS]")
    ] = None,
    version: Annotated[
        str | None, typer.Argument(help="A number, or an alias that points at one.", metavar="[VERSION]")
    ] = None,
    *,
    store: Store,
    canary: Annotated[int | None, typer.Option(help="A version that gets a share of the requests.")] = None,
    percent: Annotated[float | None, typer.Option(help="The canary's share, over 0 and under 100.")] = None,
    unset: Annotated[bool, typer.Option("--unset", help="Remove the alias.")] = False,
    as_json: Json = False,
) -> None:
    """Show an adapter's aliases, point one at a version, give it a canary, or remove it.

    Requests that name no version get what `stable` is, if it is set; else `latest`, which is the highest
    version unless it is set.
    """
    parsed, target = _name(name, "NAME"), None
    if (canary is None) != (percent is None):
        raise typer.BadParameter("--canary and --percent go together", param_hint="--canary")
    if alias is None and (unset or canary is not None):
        raise typer.BadParameter("say which alias", param_hint="ALIAS")
    if alias is not None and (version is None) != unset:
        raise typer.BadParameter("give the version, or --unset", param_hint="VERSION")
    with _told():
        storage = open_storage(store)
        if alias is None:
            _show_aliases(storage, parsed, as_json)
            return
        checked = _alias(alias, "ALIAS")
        if version is not None:
            number = parse_version(version) or _pointed_at(storage, parsed, _alias(version, "VERSION"))
            try:
                target = Target(number, canary, percent or 0.0)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--canary") from None
        _show_change(parsed, set_alias(storage, parsed, checked, target), as_json)


def rollback(
    name: Name,
    store: Store,
    alias: Annotated[str | None, typer.Option(help="Absent: what requests get that name no version.")] = None,
    as_json: Json = False,
) -> None:
    """Point an alias at what it was before its last change.

    Without aliases, `latest` is set to the version before the highest; `hotswap adapters alias NAME latest
    --unset` lets it follow the highest again.
    """
    parsed = _name(name, "NAME")
    checked = None if alias is None else _alias(alias, "--alias")
    with _told():
        _show_change(parsed, roll_back(open_storage(store), parsed, checked), as_json)


def delete_adapter(
    reference: Annotated[str, typer.Argument(help="TENANT/NAME@VERSION.", metavar="NAME@VERSION")],
    store: Store,
    force: Annotated[
        bool, typer.Option("--force", help="Even if requests get it by an alias, or as the latest.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete one version from a store, for good.

    Requests that run on it end on it, and servers keep it in memory until they need the room. Its number is
    never used again.
    """
    parsed = _reference(reference, "NAME@VERSION")
    if parsed.version is None:
        raise typer.BadParameter("say which version, as in acme/support@3", param_hint="NAME@VERSION")
    with _told():
        deleted = delete(open_storage(store), parsed.name, parsed.version, force=force)
    if as_json:
        _print_json({"adapter": str(parsed.name), **dataclasses.asdict(deleted)})
        return
    typer.echo(f"{parsed} is deleted")
    for alias in deleted.dangling:
        typer.echo(f"alias {alias} still points at it: requests for it fail until it is set", err=True)


def verify_adapters(
    reference: Annotated[
        str | None, typer.Argument(help="TENANT/NAME or TENANT/NAME@VERSION. Absent: all.", metavar="[NAME]")
    ] = None,
    *,
    store: Store,
    as_json: Json = False,
) -> None:
    """Read adapters of a store as a server would, and say what is wrong with them.

    Digests, configuration, tensors, and where aliases point; not whether they fit a base. Exit status: 0 all
    is well, 1 something is wrong, 2 the store could not be read.
    """
    parsed = None if reference is None else _reference(reference, "NAME")
    if parsed is not None and parsed.alias is not None:
        raise typer.BadParameter("give a version's number, or none", param_hint="NAME")
    from hotswap_server.adapters.verify import verify

    wanted = (None, None) if parsed is None else (parsed.name, parsed.version)
    with _told(failed=USAGE):
        wrong = _print_all(verify(store, *wanted), as_json)
    raise typer.Exit(FAILED if wrong else 0)


def _print_all(findings: Iterator[Any], as_json: bool) -> int:
    """Print findings as they come; how many are problems."""
    kept, wrong = [], 0
    for finding in findings:
        wrong += bool(finding.problem)
        if as_json:
            kept.append(dataclasses.asdict(finding))
            continue
        label = finding.adapter if finding.version is None else f"{finding.adapter}@{finding.version}"
        if finding.problem:
            typer.echo(f"{label}: WRONG: {finding.problem}")
        else:
            detail = f"{finding.method}, {finding.digest[:12]}" if finding.digest else "not there"
            typer.echo(f"{label}: {'ok' if finding.digest else '-'} ({detail})" + f" {finding.note}".rstrip())
    if as_json:
        _print_json(kept)
    return wrong


def _show_aliases(storage: Storage, name: AdapterName, as_json: bool) -> None:
    there, table = versions(storage, name), read_aliases(storage, name)
    if not there:
        raise StoreChangeError(f"the store has no adapter {name}")
    served, by = default_version(storage, name)
    if as_json:
        aliases = {alias: dataclasses.asdict(target) for alias, target in sorted(table.targets.items())}
        _print_json({"adapter": str(name), "versions": there, "aliases": aliases, "default": by})
        return
    for alias, target in sorted(({LATEST: Target(there[-1])} | dict(table.targets)).items()):
        implied = " (the highest)" if alias not in table.targets else ""
        typer.echo(f"{alias}: {target}{implied}")
    typer.echo(f"requests that name no version get {served}, by alias {by}")


def _show_change(name: AdapterName, change: Change, as_json: bool) -> None:
    if as_json:
        _print_json({"adapter": str(name), **dataclasses.asdict(change)})
        return
    now = "no longer set" if change.after is None else str(change.after)
    before = "was not set" if change.before is None else f"was {change.before}"
    typer.echo(f"{name}: alias {change.alias} is {now} ({before})")


def _pointed_at(storage: Storage, name: AdapterName, alias: str) -> int:
    target = read_aliases(storage, name).targets.get(alias)
    if target is not None:
        return target.version
    there = versions(storage, name)
    if alias == LATEST and there:
        return there[-1]
    raise StoreChangeError(f"{name} has no alias {alias}")


def _check(directory: Path, name: str) -> None:
    """Refuse what no server would serve, before it is in the store."""
    from hotswap_server.adapters.checkpoint import parse_config, parse_weights
    from hotswap_server.adapters.method import method_of

    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / file).is_file():
            raise PublishError(f"{directory} has no {file}, so it is no PEFT directory of safetensors")
    method_of(parse_config((directory / CONFIG_FILE).read_bytes(), name))
    parse_weights((directory / WEIGHTS_FILE).read_bytes(), name)


def _copy(directory: Path, target: Path) -> None:
    for path in sorted(directory.iterdir()):
        hidden = path.name.startswith(HIDDEN_PREFIX) or path.name == MANIFEST_FILE
        if path.is_file() and not hidden and path.suffix not in _PICKLES:
            shutil.copyfile(path, target / path.name)


@contextmanager
def _told(failed: int = FAILED) -> Iterator[None]:
    """Say an error in one line and exit."""
    from hotswap_server.errors import HotswapError, InvalidRequestError

    try:
        yield
    except (StoragePackageError, InvalidRequestError) as error:
        _fail(f"--store: {str(error).removeprefix('store: ')}", USAGE)
    except (HotswapError, StoreChangeError, PublishError, StorageError, OSError) as error:
        _fail(str(error), failed)


def _fail(message: str, status: int) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(status)


def _name(text: str, hint: str) -> AdapterName:
    try:
        return AdapterName.parse(text)
    except InvalidAdapterNameError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None


def _reference(text: str, hint: str) -> AdapterReference:
    try:
        return AdapterReference.parse(text)
    except InvalidAdapterNameError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None


def _alias(text: str, hint: str) -> str:
    try:
        return check_alias(text)
    except InvalidAdapterNameError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))
