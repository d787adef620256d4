"""What one look at an adapter's part of the store shows, and how long that look is good for."""

from __future__ import annotations

import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Protocol

from hotswap.layout import (
    CLAIM_PREFIX,
    CONFIG_FILE,
    MANIFEST_FILE,
    TOMBSTONE_PREFIX,
    UNNUMBERED_VERSION,
    WEIGHTS_FILE,
    marked,
    versions_in,
)
from hotswap.names import AdapterName

from hotswap_server.adapters.checkpoint import PICKLE_FILE
from hotswap_server.adapters.files import FileInfo, StoreFiles
from hotswap_server.errors import AdapterNotFoundError

_MAX_LISTINGS: Final = 4096
_NUM_LOCKS: Final = 32
# What the file systems of fsspec call the things that change when a file does, its size aside.
_CHANGE_MARKERS: Final = (
    *("mtime", "created", "ino", "modified", "updated", "generation", "md5Hash", "content_md5"),
    *("etag", "ETag", "LastModified", "last_modified"),
)

Fingerprint = tuple[object, ...]
Entries = Mapping[str, FileInfo]


@dataclass(frozen=True, slots=True)
class Location:
    """Where a version lies: its directory and the entries of that."""

    label: str  # tenant/name@version
    version: int
    directory: str
    entries: Entries

    @property
    def exists(self) -> bool:
        """Whether it is a version at all: both files are there, so an upload that goes on is not one yet.

        A pickle beside a config counts, so that it is refused by name and not passed over.
        """
        return CONFIG_FILE in self.entries and (WEIGHTS_FILE in self.entries or PICKLE_FILE in self.entries)

    @property
    def has_manifest(self) -> bool:
        return MANIFEST_FILE in self.entries

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Equal as long as the files are the same; None where the file system tells too little for that."""
        found = [fingerprint(self.entries.get(file, {})) for file in (CONFIG_FILE, WEIGHTS_FILE)]
        if None in found:
            return None
        return (*found, fingerprint(self.entries.get(MANIFEST_FILE, {})))


class Listing(Protocol):
    """The entries of `tenant/task` and of the versions in it, as they were at one time or are by now."""

    @property
    def names(self) -> set[str]:
        """The names of the entries, marks included where the storage has any."""

    def entries(self, version: int | None) -> Entries:
        """The entries of a numbered version, or of the adapter's own directory."""


class DirectoryListing:
    """Looked at when asked, since a look at a directory costs little and a file system has no whole view."""

    def __init__(self, files: StoreFiles, name: AdapterName) -> None:
        self._files, self._name = files, name

    @cached_property
    def names(self) -> set[str]:
        return self._files.names(str(self._name), str(self._name))

    def entries(self, version: int | None) -> Entries:
        if version is None:
            return self._files.entries(str(self._name), str(self._name))
        return self._files.entries(f"{self._name}/{version}", f"{self._name}@{version}")


class ObjectListing:
    """One flat listing of all objects below `tenant/task`."""

    def __init__(self, objects: Mapping[str, FileInfo]) -> None:
        self.names: set[str] = set()
        self._entries: dict[str, dict[str, FileInfo]] = {}
        for path, info in objects.items():
            directory, _, file = path.rpartition("/")
            self.names.add(path.partition("/")[0])
            self._entries.setdefault(directory, {})[file] = info

    def entries(self, version: int | None) -> Entries:
        return self._entries.get("" if version is None else str(version), {})


class Listings:
    """Listings by adapter. One of an object store is good for `refresh_s` seconds; directories keep none."""

    def __init__(self, files: StoreFiles, refresh_s: float) -> None:
        self._files = files
        self._refresh_s = refresh_s
        self._kept: OrderedDict[AdapterName, tuple[float, ObjectListing]] = OrderedDict()
        self._lock = threading.Lock()
        self._listing_locks = tuple(threading.Lock() for _ in range(_NUM_LOCKS))

    def get(self, name: AdapterName, *, fresh: bool = False) -> Listing:
        """The listing of an adapter, of now if it must be `fresh`."""
        if self._files.local:
            return DirectoryListing(self._files, name)
        asked = time.monotonic()
        good_since = asked if fresh else asked - self._refresh_s
        # Those who ask at the same time share one listing.
        with self._listing_locks[zlib.crc32(str(name).encode()) % _NUM_LOCKS]:
            with self._lock:
                kept = self._kept.get(name)
            if kept is not None and kept[0] >= good_since:
                return kept[1]
            begun = time.monotonic()
            listing = ObjectListing(self._files.find(str(name), str(name)))
            self.put(name, begun, listing)
            return listing

    def put(self, name: AdapterName, begun: float, listing: ObjectListing) -> None:
        """Keep a listing that was begun at a time of the monotonic clock."""
        with self._lock:
            self._kept[name] = (begun, listing)
            self._kept.move_to_end(name)
            if len(self._kept) > _MAX_LISTINGS:
                self._kept.popitem(last=False)

    def forget(self, name: AdapterName) -> None:
        """Look again at the next `get`."""
        with self._lock:
            self._kept.pop(name, None)


def locate(listing: Listing, name: AdapterName, version: int | None) -> Location:
    """Where a version lies, the highest one if it is None.

    A version that is there in part is given as well, if no other one can be meant.

    Raises:
        AdapterNotFoundError: there is nothing of it.
    """
    if version is not None and version != UNNUMBERED_VERSION:
        # A directory is looked into without listing those beside it.
        marks = set() if isinstance(listing, DirectoryListing) else listing.names
        locations = [_numbered(listing, name, version, marks)]
    else:
        names = listing.names
        numbers = [n for n in versions_in(names - {CONFIG_FILE}) if version is None or n == version]
        locations = [_numbered(listing, name, number, names) for number in reversed(numbers[-1:])]
        if locations and not locations[0].exists:  # the rest is looked at only when it has to be
            locations += [_numbered(listing, name, number, names) for number in reversed(numbers[:-1])]
        if str(UNNUMBERED_VERSION) not in names and names & {CONFIG_FILE, WEIGHTS_FILE}:
            locations.append(_unnumbered(listing, name, names))
    locations = [location for location in locations if location.entries]
    if not locations:
        label = str(name) if version is None else f"{name}@{version}"
        raise AdapterNotFoundError(f"the store has no adapter {label}", adapter=label)
    return next((location for location in locations if location.exists), locations[0])


def fingerprint(info: FileInfo) -> Fingerprint | None:
    """What changes when a file does; None where the file system does not tell."""
    changing = tuple(info.get(marker) for marker in _CHANGE_MARKERS)
    return None if all(value is None for value in changing) else (info.get("size"), changing)


def _numbered(listing: Listing, name: AdapterName, version: int, names: set[str]) -> Location:
    entries = {} if version in marked(names, TOMBSTONE_PREFIX) else listing.entries(version)
    if version in marked(names, CLAIM_PREFIX) and MANIFEST_FILE not in entries:
        entries = {}  # it is being published
    return Location(f"{name}@{version}", version, f"{name}/{version}", entries)


def _unnumbered(listing: Listing, name: AdapterName, names: set[str]) -> Location:
    deleted = UNNUMBERED_VERSION in marked(names, TOMBSTONE_PREFIX)
    entries = {} if deleted else listing.entries(None)
    return Location(f"{name}@{UNNUMBERED_VERSION}", UNNUMBERED_VERSION, str(name), entries)
