"""Where a store lies, for those who change it: a directory, or what fsspec reaches by a URL.

Paths are relative to the store, `/` between their parts, and made of checked names alone.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

from hotswap.layout import is_url, local_path

# fsspec's own limits for S3 are minutes; whoever configures others in fsspec's configuration keeps them.
_S3_TIMEOUTS_S: Final = {"connect_timeout": 10, "read_timeout": 30}
_MAX_DEPTH: Final = (
    4  # directories below the store that hold files of a version: tenant, task, version, one more
)
_EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# By name, as their packages need not be installed.
_DENIALS: Final = frozenset({"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"})


class StorageError(Exception):
    """The storage failed. The message names no path outside the store, nor credentials."""


class StorageDeniedError(StorageError):
    """The storage does not let these credentials do that."""


class StorageConflictError(StorageError):
    """Somebody else changed the object in the meantime."""


class StoragePackageError(StorageError):
    """Nothing installed reads such a URL; the message names the package or the extra."""


@dataclass(frozen=True, slots=True)
class Content:
    """A small file's bytes, and the mark by which `replace` knows that it is still the same."""

    data: bytes
    tag: str | None


class Storage(ABC):
    """Reading and writing of small files, and uploading of large ones. Every method blocks.

    All of them raise StorageError, StorageDeniedError when that is why.
    """

    url: str

    @abstractmethod
    def names(self, directory: str) -> set[str]:
        """The names in a directory, hidden ones too; none where there is no directory."""

    @abstractmethod
    def files(self, directory: str) -> dict[str, int]:
        """The size of each file below a directory by its path from there, hidden ones too."""

    @abstractmethod
    def read(self, path: str, limit: int) -> Content | None:
        """A file of at most `limit` bytes; None where there is none."""

    @abstractmethod
    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        """Write a small file in one step over the one that was read with `tag`, None for no file.

        Raises:
            StorageConflictError: the file is another by now, where the storage can tell.
        """

    @abstractmethod
    def bury(self, task: str, version: int, *, unnumbered: bool) -> None:
        """Let a version vanish in one step, remove its files, and keep its number taken: see `layout`.

        May be given again for one whose removal was interrupted. An `unnumbered` one lies in `task` itself.
        """

    def locked(self, directory: str) -> AbstractContextManager[None]:
        """Keeps others of this host from changing a directory's files, where the storage has locks."""
        return nullcontext()

    @abstractmethod
    def check_writable(self) -> None:
        """Find out, by writing and removing a hidden file, that the store can be written."""


def open_storage(store: str | os.PathLike[str]) -> Storage:
    """The storage of a store.

    Raises:
        StoragePackageError: nothing installed reads such a URL.
    """
    from hotswap.directory_storage import DirectoryStorage
    from hotswap.object_storage import ObjectStorage

    return ObjectStorage(os.fspath(store)) if is_url(store) else DirectoryStorage(local_path(store))


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a path or URL, without its cache of listings, and the path in it.

    Raises:
        StoragePackageError: nothing installed reads such a URL.
    """
    try:
        import fsspec  # type: ignore[import-untyped]
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise StoragePackageError(f"{_shown(url)} needs fsspec: pip install 'hotswap[server]'") from None
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = _S3_TIMEOUTS_S | dict(configured)
    try:
        # Without its cache of listings, fsspec would go on telling what it saw first.
        filesystem, root = url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'hotswap[{extra}]'" if extra else str(error)
        raise StoragePackageError(
            f"no file system for this URL is installed ({protocol}): {remedy}"
        ) from None
    except ValueError as error:
        raise StoragePackageError(f"no file system for this URL: {error}") from None
    return filesystem, root.rstrip("/")


def is_denial(error: Exception) -> bool:
    """Whether an error of a file system says that these credentials may not do that."""
    return isinstance(error, PermissionError) or type(error).__name__ in _DENIALS


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Type what storage raises. Each of fsspec's backends has errors of its own, so all are caught."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        kind = type(error).__name__  # the text may hold paths and credentials
        if isinstance(error, OSError) and error.strerror and type(error).__module__ == "builtins":
            kind = f"{kind}: {os.strerror(error.errno)}" if error.errno else kind
        if is_denial(error):
            raise StorageDeniedError(f"the store does not permit it: {what} ({kind})") from error
        raise StorageError(f"the store failed: {what} ({kind})") from error


def limited(data: bytes, limit: int, path: str) -> bytes:
    """`data`, unless it is longer than it may be."""
    if len(data) > limit:
        raise StorageError(f"{path} has more than the {limit} bytes that it may have")
    return data


def _shown(url: str) -> str:
    """A URL without what may be secret in it."""
    return ascii(url.partition("?")[0].rpartition("@")[2][:200])
