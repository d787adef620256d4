"""Changing a store: aliases set, rolled back and removed, versions deleted. Nothing of it needs a server.

Servers see a change within the time for which they reuse what they saw of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from hotswap.aliases import (
    LATEST,
    MAX_ALIASES_BYTES,
    AliasFileError,
    AliasHistoryError,
    AliasTable,
    Target,
)
from hotswap.layout import (
    ALIASES_FILE,
    CLAIM_PREFIX,
    TOMBSTONE_PREFIX,
    UNNUMBERED_VERSION,
    existing_versions,
    marked,
)
from hotswap.names import AdapterName, InvalidAdapterNameError
from hotswap.storage import Storage, StorageConflictError

AliasChange = Callable[[AliasTable], AliasTable]

_MAX_ATTEMPTS: Final = 10  # each failed one means that somebody else changed the aliases


class StoreChangeError(Exception):
    """A change that would break the store, or make no sense; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Change:
    """An alias before and after; None where it was not, or is not, set."""

    alias: str
    before: Target | None
    after: Target | None


@dataclass(frozen=True, slots=True)
class Deleted:
    """A version that is gone, and the aliases that still point at it."""

    version: int
    dangling: tuple[str, ...]


def adapters(storage: Storage) -> dict[AdapterName, list[int]]:
    """Every adapter of a store with its versions, by name. What is no adapter is left out."""
    tasks: dict[AdapterName, list[str]] = {}
    for path in storage.files(""):
        tenant, _, rest = path.partition("/")
        name, _, file = rest.partition("/")
        with suppress(InvalidAdapterNameError):
            tasks.setdefault(AdapterName(tenant, name), []).append(file)
    found = {name: existing_versions(files) for name, files in sorted(tasks.items())}
    return {name: versions for name, versions in found.items() if versions}


def versions(storage: Storage, name: AdapterName) -> list[int]:
    """The versions of an adapter, ascending, as readers see them."""
    return existing_versions(storage.files(str(name)))


def read_aliases(storage: Storage, name: AdapterName) -> AliasTable:
    """An adapter's aliases; an empty table if none was ever set.

    Raises:
        StoreChangeError: the file is damaged.
    """
    return _read_aliases(storage, name)[0]


def default_version(storage: Storage, name: AdapterName) -> tuple[Target | None, str]:
    """What a request that names no version gets, and the alias by which it gets it."""
    table, there = read_aliases(storage, name), versions(storage, name)
    alias = table.default
    latest = Target(there[-1]) if there else None
    return table.targets.get(alias, latest), alias


def set_alias(storage: Storage, name: AdapterName, alias: str, target: Target | None) -> Change:
    """Point an alias at a version, with or without a canary; None removes the alias.

    Raises:
        StoreChangeError: a version is not in the store, or there is no such alias to remove.
    """

    def change(table: AliasTable) -> AliasTable:
        if target is None and alias not in table.targets:
            raise StoreChangeError(f"{name} has no alias {alias}; it has {_listed(table)}")
        try:
            return table.set(alias, target)
        except ValueError as error:
            raise StoreChangeError(f"{name}: {error}") from None

    _require(name, target, _there(storage, name))
    return _change(storage, name, lambda table: alias, change)


def roll_back(storage: Storage, name: AdapterName, alias: str | None = None) -> Change:
    """Undo the last change of an alias; without one, of what a bare name means.

    A `latest` that was never set goes back to the version before the highest, by setting it.

    Raises:
        StoreChangeError: there is nothing to go back to.
    """
    there = _there(storage, name)

    def chosen(table: AliasTable) -> str:
        return alias or table.default

    def change(table: AliasTable) -> AliasTable:
        used = chosen(table)
        if used == LATEST and LATEST not in table.targets:
            if len(there) < 2:
                raise StoreChangeError(f"{name} has no version before its latest; it has {_numbers(there)}")
            return table.set(LATEST, Target(there[-2]))
        try:
            changed = table.rolled_back(used)
        except AliasHistoryError as error:
            raise StoreChangeError(f"{name}: {error}; its aliases are {_listed(table)}") from None
        _require(name, changed.targets.get(used), there)
        return changed

    return _change(storage, name, chosen, change)


def delete(storage: Storage, name: AdapterName, version: int, *, force: bool = False) -> Deleted:
    """Delete a version. Its number is never used again; requests that run on it end on it.

    The version is gone in one step, before the first of its files is: see `layout`. A deletion that was
    interrupted is finished by giving it again, and what is only a part of a version goes too.

    Raises:
        StoreChangeError: there is no such version; or `force` is not set and requests get it by an alias or
            because it is the latest, or it is being published.
    """
    files = storage.files(str(name))
    there, table = existing_versions(files), read_aliases(storage, name)
    top = {path.partition("/")[0] for path in files}
    numbered, grave = str(version) in top, f"{TOMBSTONE_PREFIX}{version}"
    if version not in there and not numbered and not any(path.startswith(f"{grave}/") for path in files):
        raise StoreChangeError(f"{name} has no version {version}; it has {_numbers(there)}")
    if not force:
        _refuse_served(name, version, table, is_latest=there[-1:] == [version])
        if version in marked(top, CLAIM_PREFIX) - set(there) and grave not in top:
            raise StoreChangeError(
                f"{name}@{version} is being published, or its publisher died; if so, force the deletion"
            )
    with storage.locked(str(name)):
        storage.bury(
            str(name), version, unnumbered=version == UNNUMBERED_VERSION and version in there and not numbered
        )
    return Deleted(version, tuple(read_aliases(storage, name).pointing_at(version)))


def _refuse_served(name: AdapterName, version: int, table: AliasTable, *, is_latest: bool) -> None:
    aliases = set(table.pointing_at(version))
    if is_latest and table.default == LATEST and LATEST not in table.targets:
        aliases.add(LATEST)
    if aliases:
        raise StoreChangeError(
            f"{name}@{version} is what requests get by {' and '.join(sorted(aliases))}; point that elsewhere "
            f"first (`hotswap adapters alias` or `rollback`), or force the deletion"
        )


def _change(
    storage: Storage, name: AdapterName, alias: Callable[[AliasTable], str], change: AliasChange
) -> Change:
    for _ in range(_MAX_ATTEMPTS):
        with storage.locked(str(name)), suppress(StorageConflictError):
            table, tag = _read_aliases(storage, name)
            changed = change(table)
            if changed != table:
                storage.replace(f"{name}/{ALIASES_FILE}", changed.to_json(), tag)
            used = alias(table)
            return Change(used, table.targets.get(used), changed.targets.get(used))
    raise StoreChangeError(f"{name}: others keep changing its aliases; try again")


def _read_aliases(storage: Storage, name: AdapterName) -> tuple[AliasTable, str | None]:
    content = storage.read(f"{name}/{ALIASES_FILE}", MAX_ALIASES_BYTES)
    if content is None:
        return AliasTable(), None
    try:
        return AliasTable.parse(content.data), content.tag
    except AliasFileError as error:
        raise StoreChangeError(
            f"{name}: {ALIASES_FILE} {error}; remove the file and set the aliases again"
        ) from None


def _there(storage: Storage, name: AdapterName) -> list[int]:
    there = versions(storage, name)
    if not there:
        raise StoreChangeError(f"the store has no adapter {name}")
    return there


def _require(name: AdapterName, wanted: Target | None, there: Sequence[int]) -> None:
    for version in wanted.versions if wanted is not None else ():
        if version not in there:
            raise StoreChangeError(f"{name} has no version {version}; it has {_numbers(there)}")


def _numbers(versions: Sequence[int]) -> str:
    shown = ", ".join(map(str, versions[-20:]))
    return ("… " if len(versions) > 20 else "") + shown or "none"


def _listed(table: AliasTable) -> str:
    return ", ".join(sorted(table.targets)) or "none"
