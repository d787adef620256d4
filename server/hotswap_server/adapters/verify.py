"""Checking a store as a server would read it: versions whole and readable, aliases that point somewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hotswap.aliases import AliasTable
from hotswap.layout import CLAIM_PREFIX, MANIFEST_FILE, marked
from hotswap.manifest import MAX_MANIFEST_BYTES, Manifest
from hotswap.names import AdapterName
from hotswap.storage import Storage, open_storage
from hotswap.store_admin import StoreChangeError, read_aliases

from hotswap_server.adapters.manager import AdapterManager
from hotswap_server.adapters.store import AdapterStore
from hotswap_server.errors import AdapterNotFoundError, HotswapError


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one version, or of the aliases of an adapter (`version` None).

    `problem` is empty where nothing is wrong; `note` says what is worth knowing all the same.
    """

    adapter: str
    version: int | None
    digest: str
    method: str
    problem: str
    note: str = ""


def verify(url: str, name: AdapterName | None = None, version: int | None = None) -> Iterator[Finding]:
    """One finding per version, and one per adapter whose aliases are wrong.

    A version is read and checked as for serving: the manifest, both digests, its configuration and all of its
    tensors. The other files of its manifest must be there in their size. Whether it fits a base is not looked
    at.

    Raises:
        StoreUnavailableError: the store as a whole cannot be read.
        AdapterNotFoundError: there is no such adapter or version.
    """
    store, storage = AdapterManager.open_store(url), open_storage(url)
    found = [
        stored
        for stored in store.list()
        if (name is None or stored.name == str(name)) and (version is None or version in stored.versions)
    ]
    if name is not None and not found:
        raise AdapterNotFoundError(
            f"the store has no adapter {name}{'' if version is None else f'@{version}'}"
        )
    for stored in found:
        for number in stored.versions if version is None else [version]:
            yield _version(store, storage, stored.name, number)
        if version is None:
            yield from _aliases(storage, AdapterName.parse(stored.name), stored.versions)
            yield from _unfinished(storage, stored.name, stored.versions)


def _version(store: AdapterStore, storage: Storage, name: str, version: int) -> Finding:
    try:
        ref = store.resolve(name, version)
        store.read(ref)
    except HotswapError as error:
        return Finding(name, version, "", "", str(error).removeprefix(f"{name}@{version}: "))
    problem, note = _other_files(storage, f"{name}/{version}")
    return Finding(name, version, ref.digest, ref.method, problem, note)


def _other_files(storage: Storage, directory: str) -> tuple[str, str]:
    content = storage.read(f"{directory}/{MANIFEST_FILE}", MAX_MANIFEST_BYTES)
    if content is None:
        return "", "it has no manifest, so nothing tells whether its content is what was put there"
    sizes = storage.files(directory)
    for file, record in Manifest.parse(content.data).files.items():
        if sizes.get(file) != record.size:
            return f"{file} is missing, or has not the {record.size} bytes that were published", ""
    return "", ""


def _aliases(storage: Storage, name: AdapterName, versions: Sequence[int]) -> Iterator[Finding]:
    try:
        table = read_aliases(storage, name)
    except StoreChangeError as error:
        yield Finding(str(name), None, "", "", str(error).removeprefix(f"{name}: "))
        return
    for alias in sorted(table.targets):
        if missing := _missing(table, alias, versions):
            yield Finding(str(name), None, "", "", f"alias {alias} points at {missing}, which is not there")


def _missing(table: AliasTable, alias: str, versions: Sequence[int]) -> str:
    return " and ".join(f"version {v}" for v in table.targets[alias].versions if v not in versions)


def _unfinished(storage: Storage, name: str, versions: Sequence[int]) -> Iterator[Finding]:
    for version in sorted(marked(storage.names(name), CLAIM_PREFIX) - set(versions)):
        yield Finding(name, version, "", "", "", "it is being published, or its publisher died")
