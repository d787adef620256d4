"""A store in an object store or whatever else fsspec reaches by a URL, for those who change it."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hotswap.layout import (
    CLAIM_PREFIX,
    CONFIG_FILE,
    HIDDEN_PREFIX,
    MANIFEST_FILE,
    TOMBSTONE_PREFIX,
    WEIGHTS_FILE,
)
from hotswap.storage import Content, Storage, StorageConflictError, limited, open_filesystem, storage_errors


class ObjectStorage(Storage):
    """A store at a URL. `create` is exclusive where the storage has conditional puts."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = open_filesystem(url)
        protocols = self._fs.protocol
        self._s3 = "s3" in ((protocols,) if isinstance(protocols, str) else protocols)

    def names(self, directory: str) -> set[str]:
        return {path.partition("/")[0] for path in self.files(directory)}

    def files(self, directory: str) -> dict[str, int]:
        root = self._path(directory)
        with storage_errors(f"list {directory or 'it'}"):
            try:
                found: Mapping[str, Any] = self._fs.find(root, detail=True)
            except FileNotFoundError as error:
                if "bucket" in str(error).lower():
                    raise
                return {}
            relative = {path.removeprefix(root).strip("/"): info for path, info in found.items()}
            return {path: int(info["size"] or 0) for path, info in relative.items() if path}

    def read(self, path: str, limit: int) -> Content | None:
        with storage_errors(f"read {path}"):
            try:
                # The tag first: a change in between is then seen as one by `replace`.
                tag = self._fs.info(self._path(path)).get("ETag") if self._s3 else None
                data: bytes = self._fs.cat_file(self._path(path), start=0, end=limit + 1)
            except FileNotFoundError:
                return None
        return Content(limited(data, limit, path), tag)

    def create(self, path: str, data: bytes) -> bool:
        """Put an object if there is none; whether it was put. `data` should be like no other's."""
        with storage_errors(f"write {path}"):
            try:
                self._fs.pipe_file(self._path(path), data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError, ValueError):
                if self._fs.exists(self._path(path)):
                    return False
                self._fs.pipe_file(self._path(path), data)
            except OSError as error:
                if "ConditionalRequestConflict" not in str(error.__cause__ or error):
                    raise
                return False
            # A server that does not know the condition takes every put.
            return bool(self._fs.cat_file(self._path(path)) == data)

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        with storage_errors(f"write {path}"):
            if not self._s3:
                self._fs.pipe_file(self._path(path), data)
                return
            condition = {"IfMatch": tag} if tag else {"mode": "create"}
            try:
                self._fs.pipe_file(self._path(path), data, **condition)
            except Exception as error:
                texts = f"{error} {error.__cause__}"
                if "NotImplemented" in texts:
                    self._fs.pipe_file(self._path(path), data)
                elif isinstance(error, FileExistsError | FileNotFoundError) or "Precondition" in texts:
                    raise StorageConflictError(f"{path} was changed by somebody else") from error
                else:
                    raise

    def upload(self, source: Path, path: str) -> None:
        """Put a file of any size."""
        with storage_errors(f"write {path}"):
            self._fs.put_file(os.fspath(source), self._path(path))

    def remove(self, path: str) -> None:
        """Remove an object, if it is there."""
        with storage_errors(f"remove {path}"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(path))

    def bury(self, task: str, version: int, *, unnumbered: bool) -> None:
        since = json.dumps({"since": time.time()}).encode()
        with storage_errors(f"write {task}/{TOMBSTONE_PREFIX}{version}"):
            self._fs.pipe_file(self._path(f"{task}/{TOMBSTONE_PREFIX}{version}"), since)
        # A reader that has not seen the mark finds no configuration before it misses anything else.
        first = (CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE)
        if unnumbered:
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                self.remove(f"{task}/{file}")
        else:
            self.remove_tree(f"{task}/{version}", first=first)
        self.remove(f"{task}/{CLAIM_PREFIX}{version}")

    def remove_tree(self, directory: str, *, first: tuple[str, ...] = ()) -> None:
        """Remove the objects below a directory, those named by `first` before the others."""
        rest = self.files(directory)
        for file in (*(name for name in first if name in rest), *(rest.keys() - set(first))):
            self.remove(f"{directory}/{file}")

    def check_writable(self) -> None:
        probe = f"{HIDDEN_PREFIX}hotswap-{uuid.uuid4().hex}"
        self.replace(probe, b"can it be written?\n", None)
        self.remove(probe)

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")
