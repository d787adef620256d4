"""Publishing a version into an object store: claim its number, put its files, then its manifest.

`layout` describes the steps, and what readers make of a version at each of them.
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from hotswap.layout import (
    CLAIM_PREFIX,
    CONFIG_FILE,
    MANIFEST_FILE,
    TOMBSTONE_PREFIX,
    WEIGHTS_FILE,
    PublishError,
    marked,
    next_version,
)
from hotswap.manifest import Manifest
from hotswap.names import MAX_VERSION, AdapterName
from hotswap.object_storage import ObjectStorage
from hotswap.publish_directory import check_complete, manifest_of
from hotswap.storage import StorageError

CLAIM_AGE_S: Final = 24 * 3600.0
"""Seconds after which the claim of a publisher counts as abandoned."""

_MAX_ATTEMPTS = 1000  # each failed one means that another publisher took the number
_MAX_CLAIM_BYTES = 1 << 10


def publish_objects(
    url: str, name: AdapterName, write: Callable[[Path], None], required: Sequence[str]
) -> int:
    """`layout.publish` for a URL. The files lie in a temporary directory of this machine before."""
    storage, task = ObjectStorage(url), str(name)
    with tempfile.TemporaryDirectory(prefix="hotswap-publish-") as temporary:
        directory = Path(temporary)
        write(directory)
        check_complete(directory, required)
        manifest = manifest_of(directory)
        _remove_abandoned(storage, task)
        with _claimed(storage, task) as version:
            _put(storage, directory, f"{task}/{version}", manifest)
    return version


def _put(storage: ObjectStorage, directory: Path, target: str, manifest: Manifest) -> None:
    # Whoever sees a part of the objects finds no configuration before all else is there.
    last = (WEIGHTS_FILE, CONFIG_FILE)
    for file in sorted(manifest.files, key=lambda file: (last.index(file) if file in last else -1, file)):
        storage.upload(directory / file, f"{target}/{file}")
    there = storage.files(target)
    for file, record in manifest.files.items():
        if there.get(file) != record.size:
            raise PublishError(f"{file} is not in the store with the size it was put with; publish again")
    if not storage.create(f"{target}/{MANIFEST_FILE}", manifest.to_json()):
        raise PublishError("somebody else wrote the version's manifest; publish again")


@contextmanager
def _claimed(storage: ObjectStorage, task: str) -> Iterator[int]:
    """A number that is nobody else's; on an exception, what was put under it goes again."""
    version = _claim(storage, task)
    try:
        yield version
    except BaseException:
        with suppress(StorageError):  # a later publisher does it
            storage.remove_tree(f"{task}/{version}", first=(MANIFEST_FILE, CONFIG_FILE))
            storage.remove(_claim_of(task, version))
        raise
    with suppress(StorageError):  # with the manifest there, the claim says nothing
        storage.remove(_claim_of(task, version))


def _claim(storage: ObjectStorage, task: str) -> int:
    for _ in range(_MAX_ATTEMPTS):
        version = next_version(storage.names(task))
        if version > MAX_VERSION:
            raise PublishError(f"the adapter is at the highest version number, {MAX_VERSION}")
        claim = {"since": time.time(), "by": uuid.uuid4().hex}
        if not storage.create(_claim_of(task, version), json.dumps(claim).encode()):
            continue
        # Another publisher may have finished, and removed its claim, since the names were listed.
        names = storage.names(task)
        if str(version) not in names and f"{TOMBSTONE_PREFIX}{version}" not in names:
            return version
        storage.remove(_claim_of(task, version))
    raise PublishError("no free version number: other publishers keep taking the next one")


def _remove_abandoned(storage: ObjectStorage, task: str) -> None:
    """Remove old claims with what their dead publishers have put; a whole version stays."""
    with suppress(StorageError):  # not permitted, or on the way already: no matter
        names = storage.names(task)
        for version in marked(names, CLAIM_PREFIX):
            content = storage.read(_claim_of(task, version), _MAX_CLAIM_BYTES)
            if content is None or time.time() - _since(content.data) < CLAIM_AGE_S:
                continue
            if MANIFEST_FILE not in storage.names(f"{task}/{version}"):
                storage.remove_tree(f"{task}/{version}", first=(CONFIG_FILE,))
            storage.remove(_claim_of(task, version))


def _since(claim: bytes) -> float:
    try:
        return float(json.loads(claim)["since"])
    except (ValueError, TypeError, KeyError):
        return time.time()


def _claim_of(task: str, version: int) -> str:
    return f"{task}/{CLAIM_PREFIX}{version}"
