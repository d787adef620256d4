"""The adapter store as the server sees it: read-only, any fsspec URL, never trusted."""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from hotswap.layout import CONFIG_FILE, WEIGHTS_FILE, existing_versions
from hotswap.names import MAX_VERSION, AdapterName, AdapterReference, InvalidAdapterNameError

from hotswap_server.adapters.checkpoint import (
    PICKLE_FILE,
    AdapterChangedError,
    RawCheckpoint,
    parse_checkpoint,
    parse_config,
)
from hotswap_server.adapters.content import DEFAULT_MAX_WEIGHTS_BYTES, MAX_CONFIG_BYTES, VersionContent
from hotswap_server.adapters.files import FileInfo, StoreFiles
from hotswap_server.adapters.listing import Fingerprint, Listings, Location, ObjectListing, locate
from hotswap_server.adapters.store_aliases import StoreAliases
from hotswap_server.core import AdapterRef
from hotswap_server.errors import (
    AdapterNotFoundError,
    HotswapError,
    InvalidRequestError,
    StoreUnavailableError,
)

__all__ = ["DEFAULT_MAX_WEIGHTS_BYTES", "MAX_CONFIG_BYTES", "AdapterStore", "StoredAdapter"]

_MAX_KNOWN: Final = 16_384  # versions whose digest is remembered
_MAX_ATTEMPTS: Final = 3
_BATCH: Final = 256  # versions whose small files are asked for at once


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """One adapter of the store and its versions, ascending. A version that is listed need not be valid."""

    name: str
    versions: tuple[int, ...]


class AdapterStore:
    """Reads the adapters of a store. Every method blocks and may be called from any thread.

    `url` is a directory or an fsspec URL (`s3://…`, `memory://…`). `method_of` tells the method of an adapter
    from its configuration, or raises AdapterInvalidError. What is published, set or deleted is seen at once
    in a directory, and within `refresh_s` seconds elsewhere, where looking costs a request.

    Errors of all methods, beside their own: StoreUnavailableError when the storage fails, of which those that
    may pass are `transient`. No message holds a path outside the store.

    Raises:
        InvalidRequestError: nothing installed reads such a URL; the message names the missing package.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        method_of: Callable[[dict[str, object]], str],
        *,
        max_weights_bytes: int = DEFAULT_MAX_WEIGHTS_BYTES,
        refresh_s: float = 0.0,
    ) -> None:
        self._files = StoreFiles(url)
        self._listings = Listings(self._files, refresh_s)
        self._aliases = StoreAliases(self._files)
        self._content = VersionContent(self._files, max_weights_bytes)
        self._method_of = method_of
        self._known: OrderedDict[str, tuple[Fingerprint, AdapterRef]] = OrderedDict()
        self._known_lock = threading.Lock()
        self._reading_locks = tuple(threading.Lock() for _ in range(32))

    def resolve(self, name: str, version: int | None = None, *, key: str | None = None) -> AdapterRef:
        """The version that a request for `name` gets now.

        `name` is `tenant/name`, or `tenant/name@3` or `tenant/name@stable` instead of a `version`. Without
        either it is what the alias `stable` means if that is set, else what `latest` does, else the highest.
        `key` chooses between an alias's version and its canary; without one it is never the canary.

        The digest is the manifest's; without one it is computed from the content once, and again when size,
        times or etag of a file change.

        Raises:
            InvalidRequestError: `name` or `version` can never be one.
            AdapterNotFoundError: the store has none.
            AdapterInvalidError: the version lacks a file, is too large, or has a configuration nobody serves.
            AdapterDamagedError: it is not what its manifest says.
        """
        reference = _parse(name, version)
        location = self._locate(reference, key)
        return self._recall(location) or self._inspect(location)

    def peek(self, name: str, version: int) -> AdapterRef:
        """As `resolve` by number, but what would have to be fetched to be hashed has no digest."""
        if self._files.local:
            return self.resolve(name, version)
        location = self._locate(_parse(name, version), None)
        return self._recall(location) or self._describe(location)[0]

    def list(self) -> Sequence[StoredAdapter]:
        """Every adapter with its versions, by name. What cannot be read, or is no adapter, is left out."""
        paths = self._files.walk() if self._files.local else self._find()
        tasks: defaultdict[AdapterName, set[str]] = defaultdict(set)
        for path in paths:
            tenant, _, rest = path.partition("/")
            name, _, file = rest.partition("/")
            with suppress(InvalidAdapterNameError):
                tasks[AdapterName(tenant, name)].add(file)
        found = {
            n: existing_versions(files, weights=(WEIGHTS_FILE, PICKLE_FILE)) for n, files in tasks.items()
        }
        return [StoredAdapter(str(name), tuple(found[name])) for name in sorted(found) if found[name]]

    def survey(self, versions: Iterable[tuple[str, int]]) -> None:
        """Read together what `peek` would read of one version after the other, in an object store.

        What cannot be read is left to `peek`, which says why.
        """
        if self._files.local:
            return
        unknown: list[Location] = []
        for name, version in versions:
            with suppress(HotswapError):
                location = self._locate(_parse(name, version), None)
                if self._recall(location) is None and location.has_manifest:
                    unknown.append(location)
        for start in range(0, len(unknown), _BATCH):
            batch = unknown[start : start + _BATCH]
            small = self._content.prefetch(batch)
            for location in batch:
                with suppress(HotswapError):
                    self._describe(location, small)

    def read(self, ref: AdapterRef) -> RawCheckpoint:
        """The content of a resolved version, checked against its digest.

        Raises:
            AdapterNotFoundError: the version is gone.
            AdapterDamagedError: a file is not what the manifest says.
            AdapterChangedError: its directory was changed in place since; what `ref` meant no longer exists,
                so this is not retried, and the next `resolve` gives the new content.
            AdapterInvalidError: a file is damaged.
        """
        name = _parse(ref.name, ref.version).name
        try:
            location = locate(self._listings.get(name), name, ref.version)
            config = self._content.read(location, CONFIG_FILE)
            weights = self._content.read(location, WEIGHTS_FILE)
            try:
                return parse_checkpoint(config, weights, ref)
            except AdapterChangedError:
                with self._known_lock:
                    self._known.pop(location.directory, None)
                location = locate(self._listings.get(name, fresh=True), name, ref.version)
                damage = self._content.damage(location, ref.digest, config, weights)
                if damage is not None:
                    raise damage from None
                raise
        except HotswapError:
            self._listings.forget(name)  # it may have shown what is no longer so
            raise

    def _locate(self, reference: AdapterReference, key: str | None) -> Location:
        name, listing = reference.name, self._listings.get(reference.name)
        if reference.version is not None:
            return locate(listing, name, reference.version)
        version = self._aliases.choose(listing, name, reference.alias, key)
        try:
            return locate(listing, name, version)
        except AdapterNotFoundError:
            if version is None:
                raise
            raise AdapterNotFoundError(
                f"an alias of {name} means version {version}, which the store does not have; point it at "
                f"another one with `hotswap adapters alias`",
                adapter=str(reference),
            ) from None

    def _inspect(self, location: Location) -> AdapterRef:
        # One thread reads; others that want the same version wait and then find its digest.
        with self._reading_locks[zlib.crc32(location.directory.encode()) % len(self._reading_locks)]:
            for _ in range(_MAX_ATTEMPTS):
                known = self._recall(location)
                if known is not None:
                    return known
                ref, config = self._describe(location)
                if ref.digest:
                    return ref
                ref = replace(ref, digest=self._content.digest(location, config))
                name = AdapterName.parse(ref.name)
                after = locate(self._listings.get(name, fresh=True), name, location.version)
                if after.fingerprint == location.fingerprint:
                    self._remember(location, ref)
                    return ref
                location = after
        raise StoreUnavailableError(f"{location.label} keeps changing while it is read; retry later")

    def _describe(
        self, location: Location, small: Mapping[str, bytes] | None = None
    ) -> tuple[AdapterRef, bytes]:
        """The version, without its digest where only the weights could tell that, and its configuration."""
        config, digest = self._content.describe(location, small)
        method = self._method_of(parse_config(config, location.label))
        ref = AdapterRef(location.label.partition("@")[0], location.version, digest or "", method)
        if digest is not None:
            self._remember(location, ref)
        return ref, config

    def _find(self) -> Iterable[str]:
        """The paths of all objects; what is seen of each adapter counts as a look at it."""
        begun = time.monotonic()
        found = self._files.find("", "the list")
        tasks: defaultdict[AdapterName, dict[str, FileInfo]] = defaultdict(dict)
        for path, info in found.items():
            tenant, _, rest = path.partition("/")
            name, _, file = rest.partition("/")
            if file:
                with suppress(InvalidAdapterNameError):
                    tasks[AdapterName(tenant, name)][file] = info
        for adapter, objects in tasks.items():
            self._listings.put(adapter, begun, ObjectListing(objects))
        return found

    def _recall(self, location: Location) -> AdapterRef | None:
        fingerprint = location.fingerprint
        with self._known_lock:
            known = self._known.get(location.directory)
            if known is None or fingerprint is None or known[0] != fingerprint:
                return None
            self._known.move_to_end(location.directory)
            return known[1]

    def _remember(self, location: Location, ref: AdapterRef) -> None:
        fingerprint = location.fingerprint
        if fingerprint is None:
            return
        with self._known_lock:
            self._known[location.directory] = (fingerprint, ref)
            self._known.move_to_end(location.directory)
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)


def _parse(name: str, version: int | None) -> AdapterReference:
    if version is not None and not 1 <= version <= MAX_VERSION:
        raise InvalidRequestError("version", f"must be between 1 and {MAX_VERSION}, got {version}")
    try:
        reference = AdapterReference.parse(name)
    except InvalidAdapterNameError as error:
        raise InvalidRequestError("adapter", str(error)) from None
    if version is None:
        return reference
    if str(reference) != str(reference.name):
        raise InvalidRequestError("version", f"must be absent where the adapter is given as {reference}")
    return replace(reference, version=version)
