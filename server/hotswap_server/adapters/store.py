"""The adapter store as the server sees it: read-only, any fsspec URL, never trusted."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from hotswap.layout import (
    CONFIG_FILE,
    UNNUMBERED_VERSION,
    WEIGHTS_FILE,
    content_digest,
    versions_in,
)
from hotswap.names import MAX_VERSION, AdapterName, InvalidAdapterNameError

from hotswap_server.adapters.checkpoint import (
    CONVERT_REMEDY,
    PICKLE_FILE,
    AdapterChangedError,
    RawCheckpoint,
    file_error,
    parse_checkpoint,
    parse_config,
)
from hotswap_server.adapters.files import FileInfo, StoreFiles
from hotswap_server.core import AdapterRef
from hotswap_server.errors import (
    AdapterNotFoundError,
    InvalidRequestError,
    StoreUnavailableError,
)

MAX_CONFIG_BYTES: Final = 1 << 20
DEFAULT_MAX_WEIGHTS_BYTES: Final = 2 << 30

_MAX_KNOWN = 16_384  # versions whose digest is remembered
_MAX_ATTEMPTS = 3
# What the file systems of fsspec call the things that change when a file does, its size aside.
_CHANGE_MARKERS = (
    *("mtime", "created", "ino", "modified", "updated", "generation", "md5Hash", "content_md5"),
    *("etag", "ETag", "LastModified", "last_modified"),
)

Fingerprint = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """One adapter of the store and its versions, ascending. A version that is listed need not be valid."""

    name: str
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Location:
    """Where a version lies: its directory and the entries of that."""

    label: str  # tenant/name@version
    version: int
    directory: str
    entries: Mapping[str, FileInfo]

    @property
    def exists(self) -> bool:
        """Whether it is a version at all: both files are there, so an upload that goes on is not one yet.

        A pickle beside a config counts, so that it is refused by name and not passed over.
        """
        return CONFIG_FILE in self.entries and (WEIGHTS_FILE in self.entries or PICKLE_FILE in self.entries)

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Equal as long as the files are the same; None where the file system tells too little for that."""
        markers: list[object] = []
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            info = self.entries.get(file, {})
            changing = tuple(info.get(marker) for marker in _CHANGE_MARKERS)
            if all(value is None for value in changing):
                return None
            markers.append((info.get("size"), changing))
        return tuple(markers)


class AdapterStore:
    """Reads the adapters of a store. Every method blocks, may be called from any thread, and sees at once
    what was published since.

    `url` is a directory or an fsspec URL (`s3://…`, `memory://…`). `method_of` tells the method of an adapter
    from its configuration, or raises AdapterInvalidError.

    Errors of all methods, beside their own: StoreUnavailableError when the storage fails. No message holds a
    path outside the store.

    Raises:
        InvalidRequestError: nothing installed reads such a URL; the message names the missing package.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        method_of: Callable[[dict[str, object]], str],
        *,
        max_weights_bytes: int = DEFAULT_MAX_WEIGHTS_BYTES,
    ) -> None:
        self._files = StoreFiles(url)
        self._method_of = method_of
        self._max_weights_bytes = max_weights_bytes
        self._known: OrderedDict[str, tuple[Fingerprint, AdapterRef]] = OrderedDict()
        self._known_lock = threading.Lock()
        self._hashing_locks = tuple(threading.Lock() for _ in range(32))

    def resolve(self, name: str, version: int | None = None) -> AdapterRef:
        """The version of `name` that a request for it gets now: the latest one when `version` is None.

        The digest is computed from the content once, and again when size, times or etag of a file change.

        Raises:
            InvalidRequestError: `name` or `version` can never be one.
            AdapterNotFoundError: the store has none.
            AdapterInvalidError: the version lacks a file, is too large, or has a configuration nobody serves.
        """
        parsed = _parse(name, version)
        location = self._locate(parsed, version)
        known = self._recall(location)
        if known is not None:
            return known
        # One thread hashes; others that want the same adapter wait and then find its digest.
        with self._hashing_locks[zlib.crc32(location.directory.encode()) % len(self._hashing_locks)]:
            for _ in range(_MAX_ATTEMPTS):
                known = self._recall(location)
                if known is not None:
                    return known
                ref = self._inspect(parsed, location)
                after = self._locate(parsed, location.version)
                if after.fingerprint == location.fingerprint:
                    self._remember(location, ref)
                    return ref
                location = after
        raise StoreUnavailableError(f"{location.label} keeps changing while it is read; retry later")

    def list(self) -> Sequence[StoredAdapter]:
        """Every adapter with its versions, by name. What cannot be read, or is no adapter, is left out."""
        files: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
        for path in self._files.walk():
            files[path[:-1]].add(path[-1])
        versions: defaultdict[AdapterName, set[int]] = defaultdict(set)
        for directory, names in files.items():
            if CONFIG_FILE not in names or not names & {WEIGHTS_FILE, PICKLE_FILE} or len(directory) < 2:
                continue
            with suppress(InvalidAdapterNameError):
                name = AdapterName(*directory[:2])
                numbers = versions_in(directory[2:]) if len(directory) == 3 else [UNNUMBERED_VERSION]
                versions[name].update(numbers if len(directory) <= 3 else [])
        return [StoredAdapter(str(name), tuple(sorted(versions[name]))) for name in sorted(versions)]

    def read(self, ref: AdapterRef) -> RawCheckpoint:
        """The content of a resolved version, checked against its digest.

        Raises:
            AdapterNotFoundError: the version is gone.
            AdapterChangedError: its directory was changed in place since; what `ref` meant no longer exists,
                so this is not retried, and the next `resolve` gives the new content.
            AdapterInvalidError: a file is damaged.
        """
        location = self._locate(_parse(ref.name, ref.version), ref.version)
        config = self._read_config(location)
        weights = b"".join(self._read_weights(location))
        try:
            return parse_checkpoint(config, weights, ref)
        except AdapterChangedError:
            with self._known_lock:
                self._known.pop(location.directory, None)
            raise

    def _locate(self, name: AdapterName, version: int | None) -> _Location:
        task = f"{name.tenant}/{name.name}"
        if version is not None and version != UNNUMBERED_VERSION:
            locations = [self._numbered(name, task, version)]
        else:
            names = self._files.names(task, str(name))
            numbers = [n for n in versions_in(names - {CONFIG_FILE}) if version is None or n == version]
            locations = [self._numbered(name, task, number) for number in reversed(numbers[-1:])]
            if locations and not locations[0].exists:  # the rest is looked at only when it has to be
                locations += [self._numbered(name, task, number) for number in reversed(numbers[:-1])]
            if str(UNNUMBERED_VERSION) not in names and names & {CONFIG_FILE, WEIGHTS_FILE}:
                entries = self._files.entries(task, str(name))
                locations.append(_Location(f"{name}@{UNNUMBERED_VERSION}", UNNUMBERED_VERSION, task, entries))
        locations = [location for location in locations if location.entries]
        if not locations:
            label = str(name) if version is None else f"{name}@{version}"
            raise AdapterNotFoundError(f"the store has no adapter {label}", adapter=label)
        return next((location for location in locations if location.exists), locations[0])

    def _numbered(self, name: AdapterName, task: str, version: int) -> _Location:
        label, directory = f"{name}@{version}", f"{task}/{version}"
        return _Location(label, version, directory, self._files.entries(directory, label))

    def _inspect(self, name: AdapterName, location: _Location) -> AdapterRef:
        config = self._read_config(location)
        method = self._method_of(parse_config(config, location.label))
        digest = content_digest(config, self._read_weights(location))
        return AdapterRef(str(name), location.version, digest, method)

    def _recall(self, location: _Location) -> AdapterRef | None:
        fingerprint = location.fingerprint
        with self._known_lock:
            known = self._known.get(location.directory)
            if known is None or fingerprint is None or known[0] != fingerprint:
                return None
            self._known.move_to_end(location.directory)
            return known[1]

    def _remember(self, location: _Location, ref: AdapterRef) -> None:
        fingerprint = location.fingerprint
        if fingerprint is None:
            return
        with self._known_lock:
            self._known[location.directory] = (fingerprint, ref)
            self._known.move_to_end(location.directory)
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)

    def _read_config(self, location: _Location) -> bytes:
        return b"".join(self._read_file(location, CONFIG_FILE, MAX_CONFIG_BYTES))

    def _read_weights(self, location: _Location) -> Iterator[bytes]:
        if WEIGHTS_FILE not in location.entries and PICKLE_FILE in location.entries:
            raise file_error(location.label, PICKLE_FILE, f"is its only weights file: {CONVERT_REMEDY}")
        yield from self._read_file(location, WEIGHTS_FILE, self._max_weights_bytes)

    def _read_file(self, location: _Location, file: str, limit: int) -> Iterator[bytes]:
        """The file in chunks, at most the bytes that it was listed with."""
        info = location.entries.get(file)
        if info is None:
            raise file_error(location.label, file, "is missing; copy the whole PEFT directory")
        size = info.get("size")
        if info["type"] != "file" or not isinstance(size, int) or size == 0:
            raise file_error(location.label, file, "must be a regular file with content")
        if size > limit:
            raise file_error(location.label, file, f"has {size} bytes, over the limit of {limit}")
        return self._files.read(f"{location.directory}/{file}", info, location.label)


def _parse(name: str, version: int | None) -> AdapterName:
    if version is not None and not 1 <= version <= MAX_VERSION:
        raise InvalidRequestError("version", f"must be between 1 and {MAX_VERSION}, got {version}")
    try:
        return AdapterName.parse(name)
    except InvalidAdapterNameError as error:
        raise InvalidRequestError("adapter", str(error)) from None
