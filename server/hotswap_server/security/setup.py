"""A server's security from its settings, and what to warn its operator of."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from hotswap_server.config import ServeSettings
from hotswap_server.security.access import Access
from hotswap_server.security.keys_file import KeysFileError
from hotswap_server.security.tls import ServerCertificates, TLSFiles, TLSFilesError


@dataclass(frozen=True, slots=True)
class Security:
    """`certificates` None: the connection is not encrypted."""

    access: Access
    certificates: ServerCertificates | None = None

    @property
    def summary(self) -> str:
        """What the server asks of callers, in a few words."""
        encrypted = "no TLS" if self.certificates is None else "TLS"
        if self.certificates is not None and self.certificates.mutual:
            encrypted = "TLS with client certificates"
        return f"{encrypted}, {'known callers only' if self.access.required else 'every caller may do all'}"


class SecuritySettingsError(ValueError):
    """A file that a setting names cannot be used; `field` is the setting."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def open_security(settings: ServeSettings) -> Security:
    """Read the files that the settings name.

    Raises:
        SecuritySettingsError: one of them cannot be used.
    """
    try:
        access = Access(settings.keys_file)
        if settings.tls_cert is None or settings.tls_key is None:
            return Security(access)
        files = TLSFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        return Security(access, ServerCertificates(files))
    except TLSFilesError as error:
        raise SecuritySettingsError(error.field, str(error)) from None
    except KeysFileError as error:
        raise SecuritySettingsError("keys_file", str(error)) from None


def exposure_warnings(settings: ServeSettings) -> list[str]:
    """What others than this machine's users can do that they perhaps should not; one sentence each."""
    hosts = {settings.host}
    if settings.admin_port is not None:
        hosts.add(settings.admin_host or settings.host)
    open_hosts = sorted(host for host in hosts if not is_loopback(host))
    if not open_hosts:
        return []
    where = " and ".join(open_hosts)
    warnings = []
    if settings.keys_file is None and settings.tls_client_ca is None:
        warnings.append(
            f"whoever reaches {where} may use, load and unload every adapter; give --keys-file, or --host "
            "127.0.0.1 behind a proxy that knows its callers"
        )
    if settings.tls_cert is None:
        what = "API keys, prompts and answers" if settings.keys_file is not None else "prompts and answers"
        warnings.append(
            f"{what} cross the network to {where} in the clear; give --tls-cert and --tls-key, or end TLS "
            "in a proxy on this machine"
        )
    return warnings


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's alone. A name other than localhost counts as not."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
