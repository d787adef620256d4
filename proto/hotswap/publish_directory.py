"""Publishing a version into a directory: written under a hidden name, synced, and renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hotswap.layout import MANIFEST_FILE, TOMBSTONE_PREFIX, PublishError, next_version
from hotswap.manifest import Manifest, ManifestError
from hotswap.names import MAX_VERSION, AdapterName

_TEMPORARY_PREFIX = ".publish-"
_MAX_ATTEMPTS = 1000  # each failed one means that another publisher succeeded
_FOREIGN_AGE_S = 24 * 3600.0


def publish_directory(
    store: Path, name: AdapterName, write: Callable[[Path], None], required: Sequence[str]
) -> int:
    """`layout.publish` for a directory."""
    task = store / name.tenant / name.name
    _remove_abandoned(task)
    with _temporary_directory(task, store) as temporary:
        write(temporary)
        check_complete(temporary, required)
        (temporary / MANIFEST_FILE).write_bytes(manifest_of(temporary).to_json())
        _sync_tree(temporary)
        version = _rename_to_next_version(temporary, task)
        for directory in (task, task.parent, store):  # their entries may be new as well
            sync(directory)
    return version


def manifest_of(directory: Path) -> Manifest:
    """The manifest of what a publisher wrote.

    Raises:
        PublishError: a file has a name that cannot stand in a store.
    """
    try:
        return Manifest.of_directory(directory)
    except ManifestError as error:
        raise PublishError(f"the manifest of the version {error}; rename the file") from None


@contextmanager
def _temporary_directory(task: Path, store: Path) -> Iterator[Path]:
    """A hidden directory in `task`, locked while in use; on an exception it and its new parents go again."""
    missing = [directory for directory in (task, task.parent, store) if not directory.exists()]
    temporary, lock = _make_locked_directory(task)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for directory in missing:
            with suppress(OSError):  # another publisher is using it by now
                directory.rmdir()
        raise
    finally:
        os.close(lock)


def _make_locked_directory(task: Path) -> tuple[Path, int]:
    for _ in range(_MAX_ATTEMPTS):
        temporary = task / f"{_TEMPORARY_PREFIX}{_host()}-{uuid.uuid4().hex}"
        task.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()  # not tempfile's 0700: a server may run as another user
            lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # a failed publisher removed the parent, or a cleaner the directory
            continue
        if _lock(lock) is not False and _is_open_at(lock, temporary):
            return temporary, lock
        os.close(lock)
    raise PublishError("could not make a temporary directory in the store: others keep removing it")


def _remove_abandoned(task: Path) -> None:
    """Remove the temporary directories whose publisher is dead: nobody holds their lock.

    Locks of other hosts are not visible on every network file system, so theirs must also be a day old.
    """
    with suppress(FileNotFoundError):
        for entry in os.scandir(task):
            if not entry.name.startswith(_TEMPORARY_PREFIX):
                continue
            with suppress(OSError):  # gone, or another user's
                foreign = not entry.name.startswith(f"{_TEMPORARY_PREFIX}{_host()}-")
                if foreign and time.time() - entry.stat().st_mtime < _FOREIGN_AGE_S:
                    continue
                lock = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    # The path is compared after locking: its publisher may just have renamed it to a version.
                    if _lock(lock) is True and _is_open_at(lock, Path(entry.path)):
                        shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(lock)


def _lock(descriptor: int) -> bool | None:
    """Whether the lock was free and is ours now; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_open_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def check_complete(directory: Path, required: Sequence[str]) -> None:
    """Refuse a version that lacks a required file.

    Raises:
        PublishError: a file is missing, empty, or a link.
    """
    for file in required:
        try:
            status = os.lstat(directory / file)
        except FileNotFoundError:
            raise PublishError(f"a version needs {file}, and the writer made none") from None
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise PublishError(f"{file} must be a regular file with content, not a link and not empty")


def _sync_tree(directory: Path) -> None:
    # safetensors writes 0600; a file gets what open() would have given it, which the directory's mode shows.
    readable = stat.S_IMODE(os.stat(directory).st_mode) & 0o666
    for folder, _, files in os.walk(directory):
        for file in files:
            path = Path(folder, file)
            if path.is_symlink():
                continue
            path.chmod(stat.S_IMODE(path.stat().st_mode) | readable)
            sync(path)
        sync(Path(folder))


def sync(path: Path) -> None:
    """Have a file, or a directory's entries, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_to_next_version(temporary: Path, task: Path) -> int:
    for _ in range(_MAX_ATTEMPTS):
        version = next_version(os.listdir(task))
        if version > MAX_VERSION:
            raise PublishError(f"the adapter is at the highest version number, {MAX_VERSION}")
        if (task / f"{TOMBSTONE_PREFIX}{version}").exists():  # deleted while the entries were listed
            continue
        try:
            # POSIX refuses to rename a directory onto one that is not empty, and a version never is.
            os.rename(temporary, task / str(version))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return version
    raise PublishError("no free version number: other publishers keep taking the next one")
