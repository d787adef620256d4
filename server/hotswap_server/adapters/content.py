"""The files of one version, read within limits and held to its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from hotswap.layout import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, content_digest
from hotswap.manifest import MAX_MANIFEST_BYTES, FileRecord, Manifest, ManifestError

from hotswap_server.adapters.checkpoint import CONVERT_REMEDY, PICKLE_FILE, file_error
from hotswap_server.adapters.files import StoreFiles
from hotswap_server.adapters.listing import Location
from hotswap_server.errors import AdapterDamagedError, StoreUnavailableError

MAX_CONFIG_BYTES: Final = 1 << 20
DEFAULT_MAX_WEIGHTS_BYTES: Final = 2 << 30

_PUBLISH_REMEDY: Final = "publish it again, as a new version"


class VersionContent:
    """Reads versions that were located. Nothing over its limit is read, nothing beyond its listed size.

    Errors of all methods: AdapterInvalidError for a file that is missing, empty, no regular file or too
    large; AdapterDamagedError where the manifest says otherwise; AdapterNotFoundError for one that is gone;
    StoreUnavailableError when the storage fails or gives fewer bytes than it listed.
    """

    def __init__(self, files: StoreFiles, max_weights_bytes: int) -> None:
        self._files = files
        self._max_weights_bytes = max_weights_bytes
        self._limits = {
            CONFIG_FILE: MAX_CONFIG_BYTES,
            MANIFEST_FILE: MAX_MANIFEST_BYTES,
            WEIGHTS_FILE: max_weights_bytes,
        }

    def describe(
        self, location: Location, small: Mapping[str, bytes] | None = None
    ) -> tuple[bytes, str | None]:
        """The configuration and the content digest; None for that where only the weights could tell it.

        `small` is what `prefetch` gave, if it was asked before.
        """
        if not location.has_manifest:
            return self.read(location, CONFIG_FILE), None
        if small is None:
            small = {} if self._files.local else self.prefetch([location])
        manifest, config = (
            small.get(f"{location.directory}/{file}") or self.read(location, file)
            for file in (MANIFEST_FILE, CONFIG_FILE)
        )
        parsed = _parse_manifest(manifest, location)
        digest = parsed.digest
        if digest is None:
            raise _damaged(location, MANIFEST_FILE, f"lists no {WEIGHTS_FILE}")
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            self._check_size(location, file)
            _check_listed(location, file, parsed.files[file])
        _check_bytes(location, CONFIG_FILE, config, parsed.files[CONFIG_FILE])
        return config, digest

    def prefetch(self, locations: Sequence[Location]) -> dict[str, bytes]:
        """Manifests and configurations of versions in an object store, asked for at once, by their path.

        What cannot be read is left out.
        """
        return self._files.read_small(
            {
                f"{location.directory}/{file}": location.entries[file]
                for location in locations
                for file in (MANIFEST_FILE, CONFIG_FILE)
                if self._is_small(location, file)
            }
        )

    def digest(self, location: Location, config: bytes) -> str:
        """The content digest, computed from the weights."""
        return content_digest(config, self.chunks(location, WEIGHTS_FILE))

    def read(self, location: Location, file: str) -> bytes:
        """A whole file."""
        return b"".join(self.chunks(location, file))

    def chunks(self, location: Location, file: str) -> Iterator[bytes]:
        """The file in chunks, as many bytes as it was listed with."""
        self._check_size(location, file)
        listed, got = int(location.entries[file]["size"]), 0
        for chunk in self._files.read(f"{location.directory}/{file}", location.entries[file], location.label):
            got += len(chunk)
            yield chunk
        if got != listed:
            raise StoreUnavailableError(
                f"{location.label}: the store gave {got} of the {listed} bytes of {file}; retry later",
                adapter=location.label,
            )

    def damage(
        self, location: Location, digest: str, config: bytes, weights: bytes
    ) -> AdapterDamagedError | None:
        """What is wrong with content that ought to have a digest: None if its manifest never said so."""
        if not location.has_manifest:
            return None
        manifest = _parse_manifest(self.read(location, MANIFEST_FILE), location)
        if manifest.digest != digest:
            return None
        for file, data in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights)):
            record = manifest.files[file]
            try:
                _check_bytes(location, file, data, record)
            except AdapterDamagedError as error:
                return error
        return None

    def _is_small(self, location: Location, file: str) -> bool:
        size = location.entries.get(file, {}).get("size")
        return isinstance(size, int) and 0 < size <= self._limits[file]

    def _check_size(self, location: Location, file: str) -> None:
        if file == WEIGHTS_FILE and file not in location.entries and PICKLE_FILE in location.entries:
            raise file_error(location.label, PICKLE_FILE, f"is its only weights file: {CONVERT_REMEDY}")
        info = location.entries.get(file)
        if info is None:
            raise file_error(location.label, file, "is missing; copy the whole PEFT directory")
        size = info.get("size")
        if info["type"] != "file" or not isinstance(size, int) or size == 0:
            raise file_error(location.label, file, "must be a regular file with content")
        if size > self._limits[file]:
            raise file_error(
                location.label, file, f"has {size} bytes, over the limit of {self._limits[file]}"
            )


def _parse_manifest(data: bytes, location: Location) -> Manifest:
    try:
        return Manifest.parse(data)
    except ManifestError as error:
        raise _damaged(location, MANIFEST_FILE, str(error)) from None


def _check_listed(location: Location, file: str, record: FileRecord) -> None:
    size = location.entries[file]["size"]
    if size != record.size:
        raise _damaged(location, file, f"has {size} bytes, and was published with {record.size}")


def _check_bytes(location: Location, file: str, data: bytes, record: FileRecord) -> None:
    if len(data) != record.size:
        raise _damaged(location, file, f"has {len(data)} bytes, and was published with {record.size}")
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise _damaged(location, file, "is not the content that was published: its SHA-256 differs")


def _damaged(location: Location, file: str, problem: str) -> AdapterDamagedError:
    return AdapterDamagedError(
        f"{location.label}: {file} {problem}; {_PUBLISH_REMEDY}", adapter=location.label, file=file
    )
