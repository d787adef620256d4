"""The server's certificate, key and client authority, read again for new connections when they change."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

logger = structlog.stdlib.get_logger(__name__)


class TLSFilesError(ValueError):
    """The files cannot be used; `field` is the setting, and the message one line with the remedy."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """Files in PEM form: the certificate with its chain, its key without a passphrase, and the authority
    whose certificates clients must present (None: clients present none)."""

    cert: Path
    key: Path
    client_ca: Path | None = None


class ServerCertificates:
    """TLS for a server. Connections that stand keep the certificate that they began with.

    Raises:
        TLSFilesError: a file cannot be read, or they do not go together.
    """

    def __init__(self, files: TLSFiles) -> None:
        self._files = files
        self._fingerprint, self._configuration = self._load()
        self._refused: object = None

    @property
    def mutual(self) -> bool:
        """Whether clients must present a certificate."""
        return self._files.client_ca is not None

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`, once: gRPC keeps in them what it has asked for."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._changed,  # type: ignore[arg-type]  # its None is documented, but not in the stubs
            require_client_authentication=self.mutual,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC asks before each handshake, on threads of its own; None for no change."""
        fingerprint = self._stat()
        if fingerprint == self._fingerprint:
            return None
        try:
            self._fingerprint, self._configuration = self._load()
        except TLSFilesError as error:
            if fingerprint != self._refused:  # a rotation that is half done ends with another change
                logger.warning("tls_files_unusable", error=str(error), effect="the ones read before stay")
            self._refused = fingerprint
            return None
        logger.info("tls_files_read")
        return self._configuration

    def _load(self) -> tuple[object, grpc.ServerCertificateConfiguration]:
        content, fingerprint = self._read(), self._stat()
        _check(self._files, content.get("tls_client_ca"))
        if content != self._read():
            raise TLSFilesError("tls_cert", f"{self._files.cert}: the files changed while they were read")
        pair = (content["tls_key"], content["tls_cert"])
        return fingerprint, grpc.ssl_server_certificate_configuration([pair], content.get("tls_client_ca"))

    def _read(self) -> dict[str, bytes]:
        return {field: _read(field, path) for field, path in self._paths()}

    def _stat(self) -> object:
        return [_stat(path) for _, path in self._paths()]

    def _paths(self) -> list[tuple[str, Path]]:
        files = self._files
        paths = [("tls_cert", files.cert), ("tls_key", files.key)]
        return paths if files.client_ca is None else [*paths, ("tls_client_ca", files.client_ca)]


def _stat(path: Path) -> object:
    try:
        info = os.stat(path)
    except OSError as error:
        return error.errno
    return info.st_mtime_ns, info.st_size, info.st_ino


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TLSFilesError(field, f"{path}: cannot be read: {error.strerror}") from None


def _check(files: TLSFiles, client_ca: bytes | None) -> None:
    """Refuse what gRPC would fail on at the first connection, without saying why."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.cert, files.key, password=lambda: "")
    except OSError as error:  # ssl.SSLError is one
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        raise TLSFilesError(
            "tls_cert",
            f"{files.cert} and {files.key} are no certificate with its key in PEM form, the key without a "
            f"passphrase ({str(reason).lower().replace('_', ' ')})",
        ) from None
    if client_ca is not None:
        try:
            context.load_verify_locations(cadata=client_ca.decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise TLSFilesError(
                "tls_client_ca", f"{files.client_ca} holds no certificate in PEM form"
            ) from None
