"""A store's directories and files over fsspec: reading only, nothing outside the store, typed errors.

`hotswap.storage` is for those who change a store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from hotswap.layout import HIDDEN_PREFIX
from hotswap.storage import StoragePackageError, is_denial, open_filesystem

from hotswap_server.errors import (
    AdapterInvalidError,
    AdapterNotFoundError,
    HotswapError,
    InvalidRequestError,
    StoreDeniedError,
    StoreUnavailableError,
)

FileInfo = Mapping[str, Any]
"""What fsspec tells of a file: `type`, `size`, and what else its file system knows."""

_CHUNK_BYTES = 16 << 20
_MAX_DEPTH = 3  # directories below the root: tenant, task, version


class StoreFiles:
    """Paths are relative to the root. `label` is what messages call the adapter; they hold no other path.

    Raises:
        InvalidRequestError: nothing installed reads such a URL; the message names the missing package.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        try:
            self._fs, root = open_filesystem(os.fspath(url))
        except StoragePackageError as error:
            raise InvalidRequestError("store", str(error)) from error
        self._local = isinstance(self._fs, LocalFileSystem)
        self._root: str = (os.path.realpath(root) if self._local else root).rstrip("/")

    @property
    def local(self) -> bool:
        """Whether it is a directory of this machine, where looking costs little."""
        return self._local

    def names(self, directory: str, label: str) -> set[str]:
        """The names of the entries of a directory; none where there is no directory.

        Raises:
            AdapterInvalidError: a link in the path leads out of the store.
            StoreUnavailableError: the directory cannot be read.
        """
        with self._storage_errors(label):
            return {path.rpartition("/")[2] for path in self._list(directory, label, detail=False)}

    def entries(self, directory: str, label: str) -> dict[str, FileInfo]:
        """What the entries of a directory are, by name, links followed. Otherwise as `names`, but slower."""
        with self._storage_errors(label):
            entries: dict[str, FileInfo] = {}
            for path, info in self._list(directory, label, detail=True).items():
                name = path.rpartition("/")[2]
                if info.get("islink"):
                    with suppress(OSError):  # a link to nothing is no entry
                        entries[name] = self._fs.info(path)  # of what it points to
                else:
                    entries[name] = info
            return entries

    def find(self, directory: str, label: str) -> dict[str, FileInfo]:
        """Every object below a directory, hidden ones too, by its path from there: one flat listing.

        Raises:
            StoreUnavailableError: the store as a whole cannot be read.
        """
        root = f"{self._root}/{directory}".rstrip("/")
        with self._storage_errors(label):
            try:
                found: dict[str, FileInfo] = self._fs.find(root, detail=True)
            except FileNotFoundError as error:
                if "bucket" in str(error).lower():
                    raise StoreUnavailableError("the store's bucket is missing; check its URL") from error
                return {}
        relative = {path.removeprefix(root).strip("/"): info for path, info in found.items()}
        return {path: info for path, info in relative.items() if path}

    def info(self, file: str, label: str) -> FileInfo:
        """What one file is.

        Raises:
            AdapterInvalidError: a link in the path leads out of the store.
            AdapterNotFoundError: it is gone.
        """
        path = f"{self._root}/{file}"
        self._refuse_escape(path, label)
        with self._storage_errors(label):
            info: FileInfo = self._fs.info(path)
        return info

    def walk(self) -> Iterator[str]:
        """The path of each file of a directory's store down to the versions, unreadable parts left out.

        Raises:
            StoreUnavailableError: the store as a whole cannot be read.
        """
        self.entries("", "the list")
        pending: list[tuple[str, ...]] = [()]
        while pending:
            directory = pending.pop()
            with suppress(HotswapError):
                for name, info in self.entries("/".join(directory), "the list").items():
                    if info["type"] == "file":
                        yield "/".join((*directory, name))
                    elif info["type"] == "directory" and len(directory) < _MAX_DEPTH:
                        pending.append((*directory, name))

    def read_small(self, files: Mapping[str, FileInfo]) -> dict[str, bytes]:
        """Listed small files of an object store, asked for at once, each in the size it was listed with.

        Those that cannot be read are left out: whoever needs one asks again, and its error is typed.
        """
        paths = [f"{self._root}/{file}" for file in files]
        ends = [int(info["size"]) for info in files.values()]
        try:
            found = self._fs.cat_ranges(paths, [0] * len(paths), ends, on_error="return") if paths else []
        except Exception:
            return {}
        return {file: data for file, data in zip(files, found, strict=True) if isinstance(data, bytes)}

    def read(self, file: str, info: FileInfo, label: str) -> Iterator[bytes]:
        """A listed file in chunks: the bytes that it had when listed, or fewer.

        Raises:
            AdapterInvalidError: it is a link that leads out of the store.
            AdapterNotFoundError: it is gone.
            StoreUnavailableError: it cannot be read.
        """
        path, size = f"{self._root}/{file}", int(info["size"])
        if info.get("islink"):
            self._refuse_escape(path, label)
        for start in range(0, size, _CHUNK_BYTES):
            with self._storage_errors(label):
                chunk: bytes = self._fs.cat_file(path, start=start, end=min(start + _CHUNK_BYTES, size))
            yield chunk

    def _list(self, directory: str, label: str, *, detail: bool) -> dict[str, FileInfo]:
        """What fsspec tells, by path, of the visible entries; without `detail` nothing but the paths."""
        root = f"{self._root}/{directory}".rstrip("/")
        self._refuse_escape(root, label)
        try:
            listed = self._fs.ls(root, detail=detail)
        except (FileNotFoundError, NotADirectoryError):
            if self._local and not os.path.isdir(self._root):
                raise StoreUnavailableError("the store's directory is missing; is it mounted?") from None
            return {}
        infos = (
            {info["name"].rstrip("/"): info for info in listed}
            if detail
            else {path.rstrip("/"): {} for path in listed}
        )
        infos.pop(root, None)  # a file lists itself
        return {path: infos[path] for path in infos if not path.rpartition("/")[2].startswith(HIDDEN_PREFIX)}

    def _refuse_escape(self, path: str, label: str) -> None:
        if not self._local:
            return
        real = os.path.realpath(path)
        if real != self._root and not real.startswith(self._root + "/"):
            raise AdapterInvalidError(
                f"{label}: a link in its path leads out of the store; copy the files into the store",
                adapter=label,
            )

    @contextmanager
    def _storage_errors(self, label: str) -> Iterator[None]:
        """Type what storage raises. Each of fsspec's backends has errors of its own, so all are caught."""
        try:
            yield
        except HotswapError:
            raise
        except FileNotFoundError:
            raise AdapterNotFoundError(f"{label} has just left the store", adapter=label) from None
        except Exception as error:
            kind = type(error).__name__  # the text may hold paths and credentials
            if is_denial(error):
                raise StoreDeniedError(
                    f"the store does not let this server read {label} ({kind}); give its user or credentials "
                    f"the right to list and read the store"
                ) from error
            raise StoreUnavailableError(f"the store could not be read for {label} ({kind})") from error
