"""The layout of an adapter store: what a publisher writes and a server reads.

    STORE/tenant/task/VERSION/adapter_config.json
    STORE/tenant/task/VERSION/adapter_model.safetensors
    STORE/tenant/task/VERSION/hotswap.json               the manifest: sizes and SHA-256 of the others
    STORE/tenant/task/aliases.json                       names for versions, if any were given

VERSION is a decimal number from 1 on. A version never changes and its number is never used again, not even
after it was deleted. A PEFT directory that was put there by other means needs no manifest; it exists once
it holds both files. One at `STORE/tenant/task/` itself is version 1, unless a directory `1` is there too. A
directory without those two files is no version of an adapter, as where the trainer publishes whole models.
Readers ignore every entry whose name starts with a dot, and every one that is no valid name or version, but
for the two marks below. Versions appear and vanish in one step:

In a directory: the files are written to `.publish-…` beside the versions, synced, and the directory is
renamed to the next number, which fails if another publisher took it. Deleting renames it to
`.deleted-VERSION` and then empties that; what remains of it keeps the number taken. An alias is changed by
a rename, under a lock.

In an object store, which has no rename:
1.  `tenant/task/.publishing-VERSION` claims the next number. It is put on the condition that no such object
    is there (`If-None-Match: *`), so of several publishers one gets it and the others go on to the next.
2.  The files are put, the adapter's weights and then its configuration after the others.
3.  The manifest is put: with it the version exists. Without it, none does whose number is claimed.
4.  The claim is removed. That of a publisher that died is removed by a later one after a day, with its
    files.
Deleting puts `tenant/task/.deleted-VERSION`, with which the version is gone; then its objects are removed,
and the mark stays. `aliases.json` is put on the condition that it is still what was read (`If-Match`).
Where a storage has no such conditions (that is, other than S3 and, for new objects, GCS) a publisher reads
its claim back, and of two that publish one adapter at the very same moment one may fail; of two changes of
its aliases at the same moment the later one stays.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Final

from hotswap.names import AdapterName, parse_version

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
MANIFEST_FILE: Final = "hotswap.json"
ALIASES_FILE: Final = "aliases.json"
HIDDEN_PREFIX: Final = "."
CLAIM_PREFIX: Final = ".publishing-"
TOMBSTONE_PREFIX: Final = ".deleted-"
UNNUMBERED_VERSION: Final = 1
"""The version of a PEFT directory without a version directory around it."""


class PublishError(Exception):
    """A version could not be published; the store is as it was before."""


def content_digest(config: bytes | Iterable[bytes], weights: bytes | Iterable[bytes]) -> str:
    """SHA-256, in hex, that identifies an adapter's content. Each file is given whole or in chunks.

    Hashed is, for either file, its name, a zero byte, its length in 8 big-endian bytes and its own SHA-256.
    """
    parts = []
    for content in (config, weights):
        inner, length = hashlib.sha256(), 0
        for chunk in (content,) if isinstance(content, bytes) else content:
            inner.update(chunk)
            length += len(chunk)
        parts.append((length, inner.digest()))
    return combined_digest(*parts)


def combined_digest(config: tuple[int, bytes], weights: tuple[int, bytes]) -> str:
    """`content_digest` of two files that are known by their lengths and their own SHA-256."""
    outer = hashlib.sha256()
    for name, (length, inner) in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights)):
        outer.update(name.encode() + b"\0" + length.to_bytes(8, "big") + inner)
    return outer.hexdigest()


def version_path(store: Path, name: AdapterName, version: int) -> Path:
    """The directory that `publish` gives to a version."""
    return store / name.tenant / name.name / str(version)


def version_location(store: str | os.PathLike[str], name: AdapterName, version: int) -> str:
    """Where `publish` puts a version, in a directory or at a URL, for a reader's eyes."""
    return f"{os.fspath(store).rstrip('/')}/{name}/{version}"


def versions_in(entries: Iterable[str]) -> list[int]:
    """The versions, ascending, among the names of the entries of `STORE/tenant/task/`."""
    names = set(entries)
    versions = {version for entry in names if (version := parse_version(entry)) is not None}
    if CONFIG_FILE in names and WEIGHTS_FILE in names:
        versions.add(UNNUMBERED_VERSION)
    return sorted(versions)


def marked(entries: Iterable[str], prefix: str) -> set[int]:
    """The versions that bear a mark, `CLAIM_PREFIX` or `TOMBSTONE_PREFIX`, among the same entries."""
    numbers = (parse_version(entry.removeprefix(prefix)) for entry in entries if entry.startswith(prefix))
    return {number for number in numbers if number is not None}


def existing_versions(files: Iterable[str], *, weights: Collection[str] = (WEIGHTS_FILE,)) -> list[int]:
    """The versions, ascending, among the paths of all files below `STORE/tenant/task/`, marks included.

    `weights` are the names of which one must be there beside the configuration.
    """
    entries: dict[str, set[str]] = {}
    for path in files:
        directory, _, file = path.rpartition("/")
        entries.setdefault(directory, set()).add(file)
    top = entries.get("", set())
    claimed, deleted = marked(top, CLAIM_PREFIX), marked(top | entries.keys(), TOMBSTONE_PREFIX)
    found = set()
    for directory, names in entries.items():
        version = UNNUMBERED_VERSION if not directory else parse_version(directory)
        if version is None or (not directory and str(version) in entries):
            continue
        complete = CONFIG_FILE in names and not names.isdisjoint(weights)
        if complete and version not in deleted and (MANIFEST_FILE in names or version not in claimed):
            found.add(version)
    return sorted(found)


def next_version(entries: Collection[str]) -> int:
    """One more than every version that is there, is claimed, or was there before it was deleted."""
    taken = {*versions_in(entries), *marked(entries, CLAIM_PREFIX), *marked(entries, TOMBSTONE_PREFIX)}
    return max(taken, default=0) + 1


def is_url(store: str | os.PathLike[str]) -> bool:
    """Whether a store is named by a URL, and not by a directory's path or its `file://` URL."""
    text = os.fspath(store)
    return ("://" in text or "::" in text) and not text.startswith(("file://", "local://"))


def local_path(store: str | os.PathLike[str]) -> Path:
    """The directory that a path or a `file://` URL names."""
    text = os.fspath(store)
    return Path(text.removeprefix("file://").removeprefix("local://"))


def publish(
    store: str | os.PathLike[str],
    name: AdapterName,
    write: Callable[[Path], None],
    *,
    required: Sequence[str] = (CONFIG_FILE, WEIGHTS_FILE),
) -> int:
    """Publish what `write` puts into the directory it is given as the next version of `name`.

    `store` is a directory or any URL that fsspec writes. Readers see all of the version or nothing, also when
    this process is killed. Publishers of one adapter may run side by side and get different numbers. An
    exception, `write`'s own included, leaves the store as it was. What a killed publisher leaves behind is
    hidden, and a later publisher of the same adapter removes it. Files end as readable as the umask allows.

    `required` names the files that `write` must write; by default those of a PEFT directory.

    Returns:
        The version's number.

    Raises:
        PublishError: `write` left out a required file, or wrote it as a link or empty.
        StorageError: a storage that is named by a URL cannot be written, or lacks its package.
        OSError: the directory cannot be written.
    """
    if is_url(store):
        from hotswap.publish_objects import publish_objects

        return publish_objects(os.fspath(store), name, write, required)
    from hotswap.publish_directory import publish_directory

    return publish_directory(local_path(store), name, write, required)
