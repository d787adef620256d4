"""The layout of an adapter store: what a publisher writes and a server reads.

    STORE/tenant/task/VERSION/adapter_config.json
    STORE/tenant/task/VERSION/adapter_model.safetensors

VERSION is a decimal number from 1 on; the highest one is the latest. A version exists once it holds both
files; a directory without them is none, as where the trainer publishes whole models in the same shape. A PEFT
directory dropped at `STORE/tenant/task/` itself is version 1, unless a directory `1` is there too.
Readers ignore every entry whose name starts with a dot, and every one that is no valid name or version.
"""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from hotswap.names import MAX_VERSION, AdapterName, parse_version

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
HIDDEN_PREFIX: Final = "."
UNNUMBERED_VERSION: Final = 1
"""The version of a PEFT directory without a version directory around it."""

_TEMPORARY_PREFIX = ".publish-"
_MAX_ATTEMPTS = 1000  # each failed one means that another publisher succeeded
_FOREIGN_AGE_S = 24 * 3600.0


class PublishError(Exception):
    """A version could not be published; the store is as it was before."""


def content_digest(config: bytes | Iterable[bytes], weights: bytes | Iterable[bytes]) -> str:
    """SHA-256, in hex, that identifies an adapter's content. Each file is given whole or in chunks.

    Hashed is, for either file, its name, a zero byte, its length in 8 big-endian bytes and its own SHA-256.
    """
    outer = hashlib.sha256()
    for name, content in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights)):
        inner, length = hashlib.sha256(), 0
        for chunk in (content,) if isinstance(content, bytes) else content:
            inner.update(chunk)
            length += len(chunk)
        outer.update(name.encode() + b"\0" + length.to_bytes(8, "big") + inner.digest())
    return outer.hexdigest()


def version_path(store: Path, name: AdapterName, version: int) -> Path:
    """The directory that `publish` gives to a version."""
    return store / name.tenant / name.name / str(version)


def versions_in(entries: Iterable[str]) -> list[int]:
    """The versions, ascending, among the names of the entries of `STORE/tenant/task/`."""
    names = set(entries)
    versions = {version for entry in names if (version := parse_version(entry)) is not None}
    if CONFIG_FILE in names and WEIGHTS_FILE in names:
        versions.add(UNNUMBERED_VERSION)
    return sorted(versions)


def publish(
    store: Path,
    name: AdapterName,
    write: Callable[[Path], None],
    *,
    required: Sequence[str] = (CONFIG_FILE, WEIGHTS_FILE),
) -> int:
    """Publish what `write` puts into the directory it is given as the next version of `name`.

    The version appears in one rename after its files are on disk: readers see all of it or nothing, also when
    this process is killed. Publishers of one adapter may run side by side and get different numbers.
    An exception, `write`'s own included, leaves the store as it was. What a killed publisher leaves behind is
    hidden, and a later publisher of the same adapter removes it. Files end as readable as the umask allows.

    `required` names the files that `write` must write; by default those of a PEFT directory.

    Returns:
        The version's number.

    Raises:
        PublishError: `write` left out a required file, or wrote it as a link or empty.
        OSError: the store cannot be written.
    """
    task = store / name.tenant / name.name
    _remove_abandoned(task)
    with _temporary_directory(task, store) as temporary:
        write(temporary)
        _check_complete(temporary, required)
        _sync_tree(temporary)
        version = _rename_to_next_version(temporary, task)
        for directory in (task, task.parent, store):  # their entries may be new as well
            _sync(directory)
    return version


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


def _check_complete(directory: Path, required: Sequence[str]) -> None:
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
            _sync(path)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_to_next_version(temporary: Path, task: Path) -> int:
    for _ in range(_MAX_ATTEMPTS):
        version = max(versions_in(os.listdir(task)), default=0) + 1
        if version > MAX_VERSION:
            raise PublishError(f"the adapter is at the highest version number, {MAX_VERSION}")
        try:
            # POSIX refuses to rename a directory onto one that is not empty, and a version never is.
            os.rename(temporary, task / str(version))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return version
    raise PublishError("no free version number: other publishers keep taking the next one")
