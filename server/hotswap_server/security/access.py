"""From what a caller shows to who it is, by the keys file, which is read again when it changes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from hotswap_server.errors import UnauthenticatedError
from hotswap_server.security.keys import ApiKey
from hotswap_server.security.keys_file import KeyEntry, KeysDocument, KeysFileError, read_keys
from hotswap_server.security.principals import ANYBODY, Principal

_UNKNOWN: Final = (
    "the API key is not one of this server's, or was revoked; ask the server's operator for a new one"
)
_MISSING: Final = (
    "this server answers callers that it knows: send `authorization: Bearer KEY`, or present a client "
    "certificate that it has on its list"
)

logger = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a caller shows: the values of its `authorization` metadata, its certificate's checked names."""

    authorizations: tuple[str, ...] = ()
    certificate_names: tuple[str, ...] = ()


class Access:
    """Knows the callers of a keys file; without a file everybody is `ANYBODY`.

    Raises:
        KeysFileError: the file cannot be used.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._fingerprint: object = None
        self._keys: Mapping[str, tuple[KeyEntry, Principal]] = {}
        self._certificates: Mapping[str, Principal] = {}
        if path is not None:
            self._fingerprint = _fingerprint(path)
            self._take(read_keys(path))

    @property
    def required(self) -> bool:
        """Whether callers must show who they are."""
        return self._path is not None

    def refresh(self) -> None:
        """Read the file again if it has changed; blocks. A file that cannot be used leaves the old state."""
        if self._path is None:
            return
        fingerprint = _fingerprint(self._path)
        if fingerprint == self._fingerprint:
            return
        self._fingerprint = fingerprint
        try:
            document = read_keys(self._path)
        except KeysFileError as error:
            logger.error("keys_file_unusable", error=str(error), effect="the keys read before stay valid")
            return
        self._take(document)
        logger.info("keys_file_read", keys=len(self._keys), certificates=len(self._certificates))

    def authenticate(self, shown: Shown) -> Principal:
        """Who shows that. A key goes before a certificate.

        Raises:
            UnauthenticatedError: nobody that this server knows.
        """
        if self._path is None:
            return ANYBODY
        if shown.authorizations:
            return self._of_key(shown.authorizations)
        for name in shown.certificate_names:
            if (principal := self._certificates.get(name)) is not None:
                return principal
        raise UnauthenticatedError(_MISSING)

    def _of_key(self, authorizations: Iterable[str]) -> Principal:
        scheme, _, text = ", ".join(authorizations).partition(" ")
        key = ApiKey.parse(text.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise UnauthenticatedError(_UNKNOWN)
        known = self._keys.get(key.id)
        if not key.matches(None if known is None else known[0].hash) or known is None:
            raise UnauthenticatedError(_UNKNOWN)
        entry, principal = known
        if entry.expired(datetime.now(UTC)):
            raise UnauthenticatedError(f"the API key {entry.id} has expired; ask for a new one")
        return principal

    def _take(self, document: KeysDocument) -> None:
        self._keys = {entry.id: (entry, entry.to_principal()) for entry in document.keys}
        self._certificates = {entry.subject: entry.to_principal() for entry in document.certificates}


def _fingerprint(path: Path) -> object:
    try:
        info = os.stat(path)
    except OSError as error:
        return error.errno
    return info.st_mtime_ns, info.st_size, info.st_ino, info.st_ctime_ns
