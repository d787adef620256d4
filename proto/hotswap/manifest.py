"""A version's manifest: its files with their sizes and digests. Written last, and never changed."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from hotswap.layout import CONFIG_FILE, HIDDEN_PREFIX, MANIFEST_FILE, WEIGHTS_FILE, combined_digest

MAX_MANIFEST_BYTES: Final = 1 << 20

_FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_CHUNK_BYTES = 1 << 20


class ManifestError(ValueError):
    """Bytes are no manifest; the message says why, and holds nothing of them."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: its length in bytes and its SHA-256 in lower-case hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a version by their path in it, `/` between its parts; the manifest itself is not one."""

    files: Mapping[str, FileRecord]

    @property
    def digest(self) -> str | None:
        """`layout.content_digest` of the adapter's two files; None where it is no adapter's."""
        config, weights = self.files.get(CONFIG_FILE), self.files.get(WEIGHTS_FILE)
        if config is None or weights is None:
            return None
        return combined_digest(
            (config.size, bytes.fromhex(config.sha256)), (weights.size, bytes.fromhex(weights.sha256))
        )

    @classmethod
    def of_directory(cls, directory: Path) -> Manifest:
        """The manifest of what a directory holds now; links and hidden files are left out.

        Raises:
            OSError: it cannot be read.
            ManifestError: a file's name cannot stand in a manifest.
        """
        files = {}
        for path in sorted(_regular_files(directory)):
            name = path.relative_to(directory).as_posix()
            _check_path(name)
            files[name] = _record(path)
        return cls(MappingProxyType(files))

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """The manifest that `to_json` wrote.

        Raises:
            ManifestError: `data` is anything else, or its digest does not follow from its files.
        """
        try:
            content = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError):
            raise ManifestError("is no JSON object in UTF-8") from None
        if not isinstance(content, dict) or content.get("hotswap") != _FORMAT:
            raise ManifestError(f'must be a JSON object with "hotswap": {_FORMAT}')
        listed = content.get("files")
        if not isinstance(listed, dict) or not listed:
            raise ManifestError('must list "files"')
        files = {}
        for name, record in listed.items():
            _check_path(name)
            files[name] = _parse_record(name, record)
        manifest = cls(MappingProxyType(files))
        if content.get("digest") != manifest.digest:
            raise ManifestError("has a digest that is not that of its files")
        return manifest

    def to_json(self) -> bytes:
        content = {
            "hotswap": _FORMAT,
            "published": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "digest": self.digest,
            "files": {name: {"bytes": f.size, "sha256": f.sha256} for name, f in self.files.items()},
        }
        return json.dumps(content, indent=2).encode() + b"\n"


def _regular_files(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        parts = path.relative_to(directory).parts
        hidden = any(part.startswith(HIDDEN_PREFIX) for part in parts)
        if path.is_file() and not path.is_symlink() and not hidden and parts != (MANIFEST_FILE,):
            yield path


def _record(path: Path) -> FileRecord:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def _parse_record(name: str, record: Any) -> FileRecord:
    size = record.get("bytes") if isinstance(record, dict) else None
    sha256 = record.get("sha256") if isinstance(record, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ManifestError(f"gives {name!a} no size in bytes")
    if not isinstance(sha256, str) or _SHA256.fullmatch(sha256) is None:
        raise ManifestError(f"gives {name!a} no SHA-256 in lower-case hexadecimal")
    return FileRecord(size, sha256)


def _check_path(name: str) -> None:
    """A name becomes a path below the version's directory, on any storage, so it must stay there."""
    parts = name.split("/")
    if not all(parts) or any(part.startswith(HIDDEN_PREFIX) for part in parts) or not name.isprintable():
        raise ManifestError(f"names a file {name[:80]!a}, which is hidden, or no plain relative path")
    if "\\" in name:
        raise ManifestError(f"names a file {name[:80]!a} with a backslash")
