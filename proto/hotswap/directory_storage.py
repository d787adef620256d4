"""A store in a directory, for those who change it."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from hotswap.layout import CONFIG_FILE, HIDDEN_PREFIX, TOMBSTONE_PREFIX, WEIGHTS_FILE
from hotswap.publish_directory import sync
from hotswap.storage import Content, Storage, StorageError, limited, storage_errors

_MAX_DEPTH: Final = 4  # directories below the store: tenant, task, version, and one in that


class DirectoryStorage(Storage):
    """A store in a directory. What a link would lead out of the store is refused."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def names(self, directory: str) -> set[str]:
        with storage_errors(f"list {directory}"), suppress(FileNotFoundError, NotADirectoryError):
            return set(os.listdir(self._inside(directory)))
        return set()

    def files(self, directory: str) -> dict[str, int]:
        found: dict[str, int] = {}
        with storage_errors(f"list {directory}"):
            root = self._inside(directory)
            for folder, folders, files in os.walk(root, followlinks=True):
                if len(Path(folder).relative_to(self.root).parts) >= _MAX_DEPTH:
                    folders.clear()  # links may go round in circles
                folders[:] = [name for name in folders if self._is_inside(Path(folder, name))]
                for file in files:
                    path = Path(folder, file)
                    with suppress(FileNotFoundError):
                        found[path.relative_to(root).as_posix()] = path.stat().st_size
        return found

    def read(self, path: str, limit: int) -> Content | None:
        with storage_errors(f"read {path}"):
            target = self._inside(path)
            if not target.exists():
                return None
            if not target.is_file():  # opening a pipe would wait for ever
                raise StorageError(f"{path} is no regular file")
            with target.open("rb") as file:
                data = file.read(limit + 1)
        return Content(limited(data, limit, path), None)

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        target = self._inside(path)
        temporary = target.with_name(f"{HIDDEN_PREFIX}{target.name}-{uuid.uuid4().hex}")
        with storage_errors(f"write {path}"):
            try:
                temporary.write_bytes(data)
                sync(temporary)
                temporary.rename(target)
                sync(target.parent)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def bury(self, task: str, version: int, *, unnumbered: bool) -> None:
        with storage_errors(f"delete {task}/{version}"):
            source, grave = self.root / task / str(version), self.root / task / f"{TOMBSTONE_PREFIX}{version}"
            if grave.is_symlink():
                raise StorageError(f"{task}/{grave.name} is a link; remove it")
            if unnumbered:
                grave.mkdir(exist_ok=True)
                for file in (CONFIG_FILE, WEIGHTS_FILE):  # without the first it is no version any more
                    (self.root / task / file).replace(grave / file)
            elif source.is_symlink():
                grave.mkdir(exist_ok=True)
                source.unlink()
            else:
                _empty(grave)
                with suppress(FileNotFoundError):  # an interrupted deletion came as far as this
                    source.rename(grave)
            sync(grave.parent)
            _empty(grave)

    @contextmanager
    def locked(self, directory: str) -> Iterator[None]:
        with storage_errors(f"lock {directory}"):
            descriptor = os.open(self._inside(directory), os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def check_writable(self) -> None:
        existing = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        probe = existing / f"{HIDDEN_PREFIX}hotswap-{uuid.uuid4().hex}"
        with storage_errors("write into it"):
            probe.mkdir()
            probe.rmdir()

    def _inside(self, path: str) -> Path:
        target = self.root / path
        if not self._is_inside(target):
            raise StorageError(f"a link in {path} leads out of the store")
        return target

    def _is_inside(self, path: Path) -> bool:
        return f"{os.path.realpath(path)}/".startswith(f"{os.path.realpath(self.root)}/")


def _empty(directory: Path) -> None:
    with suppress(FileNotFoundError):
        for entry in list(directory.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
